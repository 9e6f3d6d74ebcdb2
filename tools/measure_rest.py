#!/usr/bin/env python3
"""Prefill and decode speed of any OpenAI-compatible server, seen from outside, one request at a time.

    tools/measure_rest.py --url http://127.0.0.1:10002 [--url http://127.0.0.1:8080] [--prompt 512] [--generate 128]
                          [--repeat 7] [--vocab 2500]

Prompts are random token ids, so that no cache helps. Prefill is the prompt's length over the time to the first token,
decode the other tokens over the time from the first to the last. Servers are asked in turn, so that a disturbance
hits them alike; medians are printed. Only Python's standard library is needed.
"""
import argparse
import json
import random
import statistics
import time
import urllib.request


def measure(url, prompt, generate, eos):
    body = {"prompt": prompt, "max_tokens": generate, "temperature": 0, "stream": True, "logit_bias": {str(eos): -100},
            "ignore_eos": True, "cache_prompt": False}
    request = urllib.request.Request(url.rstrip("/") + "/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    begin, times = time.perf_counter(), []
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0].get("text"):
                    times.append(time.perf_counter())
    if len(times) < generate // 2:
        raise SystemExit(f"{url}: only {len(times)} pieces of text came")
    # Tokens that are parts of characters come together: the count is what was asked for, the times are the pieces'.
    return len(prompt) / (times[0] - begin), (generate - 1) / (times[-1] - times[0])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--url", action="append", required=True)
    ap.add_argument("--prompt", type=int, default=512)
    ap.add_argument("--generate", type=int, default=128)
    ap.add_argument("--repeat", type=int, default=7)
    ap.add_argument("--vocab", type=int, default=2500)
    ap.add_argument("--eos", type=int, default=1)
    args = ap.parse_args()
    results = {url: ([], []) for url in args.url}
    for round_number in range(args.repeat + 1):
        for url in args.url:
            prompt = [0] + [random.randrange(3, args.vocab) for _ in range(args.prompt - 1)]
            prefill, decode = measure(url, prompt, args.generate, args.eos)
            if round_number > 0:  # the first one warms up
                results[url][0].append(prefill)
                results[url][1].append(decode)
    for url, (prefill, decode) in results.items():
        print(f"{url}: prefill {statistics.median(prefill):.0f} tokens/s ({args.prompt} tokens), "
              f"decode {statistics.median(decode):.0f} tokens/s ({args.generate} tokens), median of {args.repeat}")


if __name__ == "__main__":
    main()

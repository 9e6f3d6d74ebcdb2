"""Runs an evaluation file against any OpenAI-compatible server and prints the accuracy per task.

    python3 eval.py eval_public.jsonl --url http://127.0.0.1:10002/v1 [--concurrency 4] [--json OUT.json]

Greedy decoding. Exits with 1 if the accuracy is below --require (a share, 0 to 1).
"""
import argparse
import collections
import json
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor


def reply_text(message):
    """The reply without its reasoning; tool calls as the text that the model wrote for them."""
    text = (message.get("content") or "").split("</think>")[-1].strip()
    for call in message.get("tool_calls") or []:
        f = call["function"]
        text += f"\n{f['name']}\n```json\n{f['arguments']}\n```"
    return text


def is_correct(item, reply):
    if item["match"] == "exact":
        return reply == item["expected"]
    return re.search(item["expected"], reply) is not None


def ask(url, item, args):
    body = {"model": args.model, "messages": item["messages"], "temperature": 0, "max_tokens": args.max_tokens}
    headers = {"Content-Type": "application/json"}
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=args.timeout) as r:
            message = json.load(r)["choices"][0]["message"]
    except (OSError, ValueError, LookupError) as e:
        return {"id": item["id"], "task": item["task"], "reply": f"[{type(e).__name__}: {e}]", "correct": False}
    reply = reply_text(message)
    return {"id": item["id"], "task": item["task"], "reply": reply, "correct": is_correct(item, reply)}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("file")
    ap.add_argument("--url", default="http://127.0.0.1:10002/v1", help="up to and including /v1")
    ap.add_argument("--model", default="tinyr1")
    ap.add_argument("--api-key")
    ap.add_argument("--concurrency", type=int, default=4)
    ap.add_argument("--max-tokens", type=int, default=600)
    ap.add_argument("--timeout", type=float, default=300, help="seconds per request")
    ap.add_argument("--limit", type=int, help="only the first items")
    ap.add_argument("--json", help="write every reply to this file")
    ap.add_argument("--require", type=float, default=0.0)
    args = ap.parse_args()

    with open(args.file, encoding="utf-8") as f:
        items = [json.loads(line) for line in f][:args.limit]
    url = args.url.rstrip("/") + "/chat/completions"
    with ThreadPoolExecutor(args.concurrency) as pool:
        results = list(pool.map(lambda it: ask(url, it, args), items))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(results, f, ensure_ascii=False, indent=1)

    tasks = collections.defaultdict(list)
    for r in results:
        tasks[r["task"]].append(r["correct"])
    for task, oks in sorted(tasks.items()):
        print(f"{task:12} {sum(oks):4}/{len(oks):<4} {100 * sum(oks) / len(oks):6.1f} %")
    share = sum(r["correct"] for r in results) / len(results)
    print(f"{'all':12} {sum(r['correct'] for r in results):4}/{len(results):<4} {100 * share:6.1f} %")
    for r in results:
        if not r["correct"]:
            print(f"wrong: {r['id']}: {r['reply'][:150]!r}")
    sys.exit(share < args.require)


if __name__ == "__main__":
    main()

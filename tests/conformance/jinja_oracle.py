#!/usr/bin/env python3
"""Renders chat templates with Python's jinja2, set up as Hugging Face transformers sets it up.

    python3 jinja_oracle.py snippets SNIPPETS.json            # prints the snippets with their results
    python3 jinja_oracle.py conversations COUNT SEED [FILE..] # random conversations for each template file

Prints a JSON list of {"template", "context", "text" or "error"}; jinja_oracle_test compares our interpreter with it.
"""
import json
import random
import sys

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant wrote; rendering takes no notice of it."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def render(template, context):
    try:
        return {"text": environment().from_string(template).render(**context)}
    except Exception as e:  # whatever goes wrong in a template
        return {"error": f"{type(e).__name__}: {e}"}


TEXTS = ["", "Hi", "What is 2+2?", "  spaces \n", "你好，世界", "naïve café 😀", "<think>\nhm\n</think>\n\nanswer", "a</think>b</think>c",
         "line\nline\r\nline", "{\"a\": 1}", "{{ not a template }} {% if %}", "'quoted' \"text\"", "<b>&amp;</b>", "\\n \\", "\u2028\u00a0"]
NAMES = ["get_weather", "add", "搜索"]


def text(r):
    return "".join(r.choice(TEXTS) for _ in range(r.randint(1, 2)))


def arguments(r):
    value = r.choice([{"city": text(r), "days": r.randint(0, 9)}, {}, {"x": [1, 2.5, None, True], "y": {"z": "é"}},
                      {"big": 1e20, "small": 1e-7}])
    return value if r.random() < 0.5 else json.dumps(value, ensure_ascii=False)


def tool(r):
    return {"type": "function", "function": {"name": r.choice(NAMES), "description": text(r), "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}


def conversation(r):
    messages = []
    for _ in range(r.choice([0, 0, 1, 1, 2])):
        messages.append({"role": "system", "content": text(r)})
    for _ in range(r.randint(0, 4)):
        messages.append({"role": "user", "content": text(r)})
        kind = r.random()
        if kind < 0.35:
            calls = [{"id": f"functions.{i}", "type": "function", "function": {
                "name": r.choice(NAMES), "arguments": arguments(r)}} for i in range(r.randint(1, 3))]
            message = {"role": "assistant", "content": r.choice([None, "", text(r)]), "tool_calls": calls}
            if r.random() < 0.1:
                del message["content"]
            messages.append(message)
            for call in calls:
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": text(r)})
            if r.random() < 0.7:
                messages.append({"role": "assistant", "content": text(r)})
        elif kind < 0.8:
            message = {"role": "assistant", "content": text(r)}
            if r.random() < 0.15:
                message["prefix"] = r.choice([True, False])
            if r.random() < 0.15:
                message["tool_calls"] = r.choice([[], None])
            messages.append(message)
    if r.random() < 0.1:
        messages.append({"role": "user", "content": [{"type": "text", "text": text(r)}, {"type": "image", "image_url": "x"}]})
    context = {"messages": messages, "bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>",
               "tools": [tool(r) for _ in range(r.randint(1, 2))] if r.random() < 0.3 else None}
    if r.random() < 0.9:
        context["add_generation_prompt"] = r.random() < 0.6
    for name in ("thinking", "enable_thinking"):
        if r.random() < 0.3:
            context[name] = r.random() < 0.5
    return context


def main():
    if sys.argv[1] == "snippets":
        with open(sys.argv[2], encoding="utf-8") as f:
            rows = json.load(f)
        out = []
        for row in rows:
            context = row.get("context", {})
            out.append({"template": row["template"], "context": context, **render(row["template"], context)})
    else:
        count, seed, files = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
        r = random.Random(seed)
        out = []
        for path in files:
            with open(path, encoding="utf-8", newline="") as f:
                source = f.read()
            template = environment().from_string(source)
            for _ in range(count):
                context = conversation(r)
                try:
                    result = {"text": template.render(**context)}
                except Exception as e:
                    result = {"error": f"{type(e).__name__}: {e}"}
                out.append({"file": path, "template": source, "context": context, **result})
    json.dump(out, sys.stdout, ensure_ascii=False, indent=0)


if __name__ == "__main__":
    main()

// The gateway as OpenAI's own JavaScript client sees it.
//
//   node openai_client.mjs http://127.0.0.1:10002/v1
//
// TANDEM_NODE_MODULES names the node_modules folder that holds the package "openai". Exit codes: 0 all as
// expected, 1 something is not, 77 the package is not there. Expects the demo model.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import path from "node:path";

const folder = process.env.TANDEM_NODE_MODULES ?? "";
let OpenAI;
try {
  OpenAI = createRequire(path.resolve(folder, "..") + "/")("openai");
} catch (error) {
  console.log(`skipped: no package openai in TANDEM_NODE_MODULES="${folder}" (${error.code})`);
  process.exit(77);
}

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const question = { messages: [{ role: "user", content: "What is 12 + 34?" }], temperature: 0 };

async function refused(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  assert.fail("the request was not refused");
}

const models = (await client.models.list()).data;
assert.equal(models.length, 1);
const model = models[0].id;
assert.equal((await client.models.retrieve(model)).id, model);

const whole = await client.chat.completions.create({ ...question, model });
assert.equal(whole.object, "chat.completion");
assert.equal(whole.choices[0].message.role, "assistant");
assert.equal(whole.choices[0].message.content, "12 + 34 = 46.");
assert.match(whole.choices[0].message.reasoning_content, /2 \+ 4 = 6/);
assert.equal(whole.choices[0].finish_reason, "stop");
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);

let content = "", reasoning = "", usage = null, finish = null, chunks = 0;
const stream = await client.chat.completions.create(
    { ...question, model, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  assert.equal(chunk.object, "chat.completion.chunk");
  ++chunks;
  content += chunk.choices[0]?.delta?.content ?? "";
  reasoning += chunk.choices[0]?.delta?.reasoning_content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
  usage = chunk.usage ?? usage;
}
assert.ok(chunks > 10);
assert.equal(content, whole.choices[0].message.content);
assert.equal(reasoning, whole.choices[0].message.reasoning_content);
assert.equal(finish, "stop");
assert.deepEqual(usage, whole.usage);

// The client's own accumulation of a stream.
const gathered = await client.chat.completions.stream({ ...question, model }).finalChatCompletion();
assert.equal(gathered.choices[0].message.content, content);

// Leaving in mid-stream.
const left = await client.chat.completions.create(
    { ...question, model, stream: true, max_tokens: 3000, ignore_eos: true });
for await (const chunk of left) {
  if (chunk.choices[0]?.delta?.reasoning_content) break;
}

const several = await client.chat.completions.create(
    { ...question, model, n: 2, logprobs: true, top_logprobs: 2, max_tokens: 8 });
assert.equal(several.choices.length, 2);
assert.equal(several.choices[1].index, 1);
assert.equal(several.choices[0].finish_reason, "length");
assert.equal(several.choices[0].logprobs.content.length, 8);
assert.equal(several.choices[0].logprobs.content[0].top_logprobs.length, 2);

const text = await client.completions.create(
    { model, prompt: "The", temperature: 0, max_tokens: 5, logprobs: 1 });
assert.equal(text.object, "text_completion");
assert.equal(text.choices[0].logprobs.tokens.length, 5);
let streamed = "";
for await (const chunk of await client.completions.create(
    { model, prompt: "The", temperature: 0, max_tokens: 5, stream: true })) {
  streamed += chunk.choices[0]?.text ?? "";
}
assert.equal(streamed, text.choices[0].text);
const echoed = await client.completions.create(
    { model, prompt: "The", temperature: 0, max_tokens: 5, echo: true });
assert.equal(echoed.choices[0].text, "The" + streamed);

const unknown = await refused(client.chat.completions.create({ ...question, model: "gpt-4" }));
assert.ok(unknown instanceof OpenAI.NotFoundError);
assert.equal(unknown.code, "model_not_found");
const wrong = await refused(client.chat.completions.create({ ...question, model, temperature: 9 }));
assert.ok(wrong instanceof OpenAI.BadRequestError);
assert.equal(wrong.param, "temperature");
const long = await refused(client.completions.create({ model, prompt: " apple".repeat(5000) }));
assert.equal(long.code, "context_length_exceeded");

console.log("all as expected");

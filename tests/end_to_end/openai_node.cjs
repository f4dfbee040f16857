// What OpenAI's npm client makes of a server: `node openai_node.cjs URL`, answers as JSON on stdout.
const OpenAI = require("openai");

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const greedy = { model: "amber", max_tokens: 12, temperature: 0, ignore_eos: true };
const messages = [{ role: "user", content: "hi" }];

async function streamed() {
  const options = { stream: true, stream_options: { include_usage: true } };
  const stream = await client.chat.completions.create({ ...greedy, messages, ...options });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

async function refused(call) {
  try {
    await call();
  } catch (error) {
    const { status, code, param, type } = error;
    return { name: error.constructor.name, status, code, param, type };
  }
  return null;
}

async function main() {
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  const schema = { name: "point", strict: true, schema: JSON.parse(process.argv[3]) };
  return {
    models,
    model: await client.models.retrieve("amber"),
    completion: await client.completions.create({ ...greedy, prompt: "hello", logprobs: 1 }),
    chat: await client.chat.completions.create({ ...greedy, messages }),
    streamed: await streamed(),
    unknown: await refused(() => client.chat.completions.create({ model: "ambre", messages })),
    wrong: await refused(() => client.completions.create({ ...greedy, prompt: "x", n: 0 })),
    json: await client.chat.completions.parse({
      ...greedy,
      ignore_eos: false,
      max_tokens: 60,
      messages,
      response_format: { type: "json_schema", json_schema: schema },
    }),
  };
}

main().then((found) => console.log(JSON.stringify(found)));

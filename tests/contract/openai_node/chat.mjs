// Prints what OpenAI's Node SDK makes of a gateway's answers, as one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: process.argv[3], maxRetries: 0 });
const messages = [{ role: "user", content: "hello" }];
const whole = await client.chat.completions.create({ model: "small", messages });
let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  model: "small",
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const refused = await client.chat.completions
  .create({ model: "nowhere", messages })
  .catch((error) => ({ name: error.constructor.name, status: error.status, code: error.code }));
console.log(
  JSON.stringify({ whole: whole.choices[0].message.content, streamed, usage, models, refused }),
);

// An answer that meets the limit of its budget, in one piece and streamed.
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const request = { model: "small", messages: [{ role: "user", content: "hello" }] };

const whole = await client.chat.completions.create(request);

let text = "";
let last;
for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  last = chunk;
}

console.log(
  JSON.stringify({
    whole: {
      text: whole.choices[0].message.content,
      reason: whole.choices[0].finish_reason,
      stopped: whole.gatehouse.stopped,
    },
    streamed: {
      text,
      reason: last.choices[0].finish_reason,
      stopped: last.gatehouse.stopped,
    },
  }),
);

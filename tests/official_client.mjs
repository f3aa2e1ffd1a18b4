// Calls of the official JavaScript client. Reads {url, cases} from standard input, prints an answer for each case.
// Its argument is the folder in which npm has installed the client.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const { PostgrestClient } = createRequire(`${process.argv[2]}/`)("@supabase/postgrest-js");
const STEPS = {
  order: (asked, column, ...ends) =>
    asked.order(column, { ascending: !ends.includes("desc"), ...(ends.includes("nullsfirst") && { nullsFirst: true }) }),
};

async function answer(url, { token, schema, call, how, arguments: given, select, steps, count }) {
  const client = new PostgrestClient(url, { schema, headers: token ? { Authorization: `Bearer ${token}` } : {} });
  let asked =
    how === "view"
      ? client.from(call).select(select ?? "*", { ...(count && { count }) })
      : client.rpc(call, given, { get: how === "get", head: how === "head", ...(count && { count }) });
  if (how !== "view" && select) asked = asked.select(select);
  for (const [step, ...words] of steps) asked = STEPS[step] ? STEPS[step](asked, ...words) : asked[step](...words);
  const { status, data, error, count: counted } = await asked;
  return { status, body: error ?? data, count: counted };
}

const { url, cases } = JSON.parse(readFileSync(0, "utf8"));
const answers = [];
for (const one of cases) answers.push(await answer(url, one));
console.log(JSON.stringify(answers));

"use strict";

// Text from the server only ever goes into textContent: a custom_id or a message is never markup.
const PERIOD_MS = 1000;
const PAGE_SIZE = 20;
const OPEN = new Set(["validating", "in_progress", "finalizing", "cancelling"]);
const byId = (id) => document.getElementById(id);
let pages = 1;
let previous = null;

function headers() {
  const key = sessionStorage.getItem("blendserve-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers() });
  if (answer.status === 401) {
    byId("key-form").hidden = false;
    throw new Error("This server asks for an API key.");
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error ? body.error.message : `${path}: status ${answer.status}`);
  }
  return answer;
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const count = (value) => Math.round(value).toLocaleString("en");
const sum = (items, name) => items.reduce((total, item) => total + (item[name] || 0), 0);
const percent = (share) => `${(100 * share).toFixed(1)} %`;

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

// Rates come from two looks at counters that only grow; a restarted engine begins at zero again.
function rates(schedulers) {
  const now = {
    at: performance.now(),
    prefill: sum(schedulers, "prefill_tokens"),
    decode: sum(schedulers, "decode_tokens"),
  };
  const before = previous;
  previous = now;
  if (!before || now.prefill < before.prefill || now.decode < before.decode) return null;
  const seconds = (now.at - before.at) / 1000;
  return {
    prefill: (now.prefill - before.prefill) / seconds,
    decode: (now.decode - before.decode) / seconds,
  };
}

function showEngine(status) {
  const engine = status.engine || { state: "up" };
  const text = engine.reason ? `engine ${engine.state}: ${engine.reason}` : `engine ${engine.state}`;
  byId("engine").textContent = engine.restarts ? `${text} (${engine.restarts} restarts)` : text;
  byId("engine").className = engine.state;
  const rate = rates(status.schedulers);
  const prompt = sum(status.schedulers, "prompt_tokens");
  const side = (name) => status.schedulers.reduce(
    (total, scheduler) => total + (scheduler.running ? scheduler.running[name] || 0 : 0), 0);
  const figures = [
    ["Prefill", rate ? `${count(rate.prefill)} tok/s` : "–"],
    ["Decode", rate ? `${count(rate.decode)} tok/s` : "–"],
    ["Prefix hits", prompt ? percent(sum(status.schedulers, "cached_tokens") / prompt) : "–"],
    ["Compute side", `${side("left")} running`],
    ["Memory side", `${side("right")} running`],
    ["Retractions", count(sum(status.schedulers, "retractions"))],
    ...(status.engines || []).map((each) => [
      `Engine ${each.url.replace(/^https?:\/\//, "")}`,
      each.state === "up" ? `${count(each.answered)} lines, ${each.in_flight} running` : each.state,
    ]),
  ];
  byId("figures").replaceChildren(...figures.map(([name, value]) => {
    const box = element("div");
    box.append(element("dt", name), element("dd", value));
    return box;
  }));
}

function timesOf(batch) {
  const end = batch.completed_at || batch.failed_at || batch.expired_at || batch.cancelled_at;
  const begin = batch.in_progress_at || batch.created_at;
  const cell = element("td", new Date(1000 * batch.created_at).toLocaleString());
  if (end) cell.append(element("small", `ran ${duration(end - begin)}`));
  else if (batch.expires_at) cell.append(element("small", `expires ${new Date(1000 * batch.expires_at).toLocaleString()}`));
  return cell;
}

function progressOf(batch, job) {
  const counts = batch.request_counts;
  const cell = element("td");
  const bar = element("progress");
  bar.max = Math.max(counts.total, 1);
  bar.value = counts.completed + counts.failed;
  cell.append(bar, element(
    "small", `${count(counts.completed)} done, ${count(counts.failed)} failed of ${count(counts.total)}`));
  if (OPEN.has(batch.status)) {
    const notes = [job && job.phase, batch.note].filter(Boolean);
    if (job && job.progress && job.progress.retried) notes.push(`${job.progress.retried} retried`);
    cell.append(element("small", notes.join(", ")));
  }
  const faults = batch.errors ? batch.errors.data : [];
  for (const fault of faults.slice(0, 3)) {
    const place = fault.line ? `line ${fault.line}: ` : "";
    cell.append(element("small", `${place}${fault.message}`, "failed"));
  }
  if (faults.length > 3) cell.append(element("small", `and ${faults.length - 3} more`, "failed"));
  return cell;
}

function tokensOf(batch) {
  const usage = batch.usage;
  const cell = element("td", `${count(usage.input_tokens)} in, ${count(usage.output_tokens)} out`);
  const share = usage.input_tokens ? usage.input_tokens_details.cached_tokens / usage.input_tokens : 0;
  cell.append(element("small", `${percent(share)} of the prompts cached`));
  return cell;
}

function actionsOf(batch) {
  const cell = element("td");
  if (batch.status === "validating" || batch.status === "in_progress") {
    const cancel = element("button", "Cancel");
    cancel.dataset.action = "cancel";
    cancel.onclick = () => attempt(async () => {
      await call(...batch.cancel || [`/v1/batches/${batch.id}/cancel`, { method: "POST" }]);
      await refresh();
    });
    cell.append(cancel);
  }
  for (const [name, id] of [["Output", batch.output_file_id], ["Errors", batch.error_file_id]]) {
    if (!id) continue;
    const button = element("button", name);
    button.onclick = () => attempt(() => download(id, `${batch.id}_${name.toLowerCase()}.jsonl`));
    cell.append(button);
  }
  return cell;
}

async function download(id, name) {
  const link = element("a");
  link.download = name;
  if (!sessionStorage.getItem("blendserve-key")) {
    link.href = `/v1/files/${id}/content`;
    link.click();
    return;
  }
  // A link cannot carry the key.
  const answer = await call(`/v1/files/${id}/content`);
  link.href = URL.createObjectURL(await answer.blob());
  link.click();
  URL.revokeObjectURL(link.href);
}

// Frontend programs that run as a job, in the shape of a batch.
function programsAsBatch(job) {
  const { total, completed, failed, usage } = job.progress;
  const body = JSON.stringify({ cancel: true });
  return {
    id: job.job_id,
    endpoint: `programs ${job.name}`,
    status: "in_progress",
    created_at: job.started_at,
    expires_at: job.deadline,
    request_counts: { total, completed, failed },
    usage: { ...usage, input_tokens_details: usage },
    cancel: [`/blendserve/programs/${job.job_id}`, { method: "POST", body }],
  };
}

function showBatches(batches, jobs) {
  const jobOf = new Map(jobs.map((job) => [job.job_id, job]));
  const programs = jobs.filter((job) => "programs" in job).map(programsAsBatch);
  byId("batches").replaceChildren(...[...programs, ...batches].map((batch) => {
    const row = element("tr");
    row.dataset.batch = batch.id;
    const name = element("td");
    name.append(element("code", batch.id), element("small", `${batch.endpoint} ${batch.model || ""}`));
    row.append(name, element("td", batch.status, batch.status), progressOf(batch, jobOf.get(batch.id)),
      tokensOf(batch), timesOf(batch), actionsOf(batch));
    return row;
  }));
}

async function allBatches() {
  const batches = [];
  let more = true;
  for (let page = 0; more && page < pages; page += 1) {
    const after = batches.length ? `&after=${batches[batches.length - 1].id}` : "";
    const list = await (await call(`/v1/batches?limit=${PAGE_SIZE}${after}`)).json();
    batches.push(...list.data);
    more = list.has_more;
  }
  byId("more").hidden = !more;
  byId("empty").hidden = batches.length > 0;
  return batches;
}

async function refresh() {
  const status = await (await call("/blendserve/status")).json();
  const batches = await allBatches();
  showEngine(status);
  showBatches(batches, status.jobs);
}

async function attempt(action) {
  try {
    await action();
    byId("problem").hidden = true;
  } catch (error) {
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
}

byId("more").onclick = () => {
  pages += 1;
  attempt(refresh);
};
byId("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("blendserve-key", byId("key").value);
  byId("key-form").hidden = true;
  attempt(refresh);
};

async function loop() {
  await attempt(refresh);
  setTimeout(loop, PERIOD_MS);
}
loop();

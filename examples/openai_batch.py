"""Run a batch file on a BlendServe server with nothing but OpenAI's own client.

The answers go to the standard output, the progress to the standard error:

    python examples/openai_batch.py examples/demo_batch.jsonl --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("file", type=Path, help="requests, one JSON object per line")
parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address")
args = parser.parse_args()

client = OpenAI(base_url=f"{args.url}/v1", api_key="unused")
upload = client.files.create(file=args.file, purpose="batch")
batch = client.batches.create(
    input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h"
)
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(2)
    batch = client.batches.retrieve(batch.id)
    if counts := batch.request_counts:
        done = f"{counts.completed} done, {counts.failed} failed of {counts.total}"
        print(f"{batch.id} {batch.status}: {done}", file=sys.stderr)

if batch.errors:
    for error in batch.errors.data or []:
        print(f"line {error.line}: {error.message}", file=sys.stderr)
for file_id in (batch.output_file_id, batch.error_file_id):
    if file_id:
        print(client.files.content(file_id).text, end="")
sys.exit(0 if batch.status == "completed" and not batch.error_file_id else 1)

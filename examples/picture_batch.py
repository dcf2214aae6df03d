"""Ask a question about every picture of a folder: ten lines of Python and a command.

python examples/picture_batch.py ~/pictures "What is in this picture?" > pictures.jsonl
blendserve run-batch -i pictures.jsonl -o answers.jsonl --model-path MODEL --media-root ~/pictures
"""

import json
import sys
from pathlib import Path

KINDS = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
folder, question = Path(sys.argv[1]).resolve(), sys.argv[2]
for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS):
    picture = {"type": "image_url", "image_url": {"url": path.as_uri()}}
    content = [picture, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 100}
    name, url = str(path.relative_to(folder)), "/v1/chat/completions"
    print(json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}))

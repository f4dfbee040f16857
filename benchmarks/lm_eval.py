"""lm-eval, unmodified, against `/v1/completions`: log-likelihoods and generated answers.

    python -m benchmarks lm_eval --task british_to_american --limit 50

Asks the demo's task and the bare backbone for the suite's test words: which of two spellings is
likelier (`loglikelihood`), and what they answer (`generate_until`). What `/score` finds for the
same pairs must agree with lm-eval's choice. Nothing is fetched but lm-eval itself, once.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.serving import Served
from benchmarks.tool_environment import (
    ROOT,
    add_server_options,
    environment,
    run_offline,
    server_of,
)

REQUIREMENTS = ("lm-eval[api]==0.4.13", "transformers>=5.20,<6")
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
LIKELIHOOD = """task: polyhead_likelihood
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
GENERATION = """task: polyhead_generation
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_server_options(parser)
    parser.add_argument("--limit", type=int, default=50, help="Test words")
    options = parser.parse_args()
    programs = environment("lm-eval", *REQUIREMENTS)
    with tempfile.TemporaryDirectory() as scratch, server_of(options) as served:
        folder = Path(scratch)
        template = served.get(f"/tasks/{options.task}")["template"] or "{input}"
        docs = documents(options.task, template, options.limit)
        write_tasks(folder, docs)
        for model in (options.task, "base"):
            found = evaluated(programs, folder, served, model, options.backbone)
            likelihood = found["polyhead_likelihood"]["acc,none"]
            generated = found["polyhead_generation"]["exact_match,none"]
            native = scored(served, model, docs)
            print(
                f"{model}: loglikelihood acc {likelihood:.3f} (/score {native:.3f}), "
                f"generate_until exact match {generated:.3f}, {len(docs)} words"
            )
            if abs(likelihood - native) > 0.001:
                raise SystemExit("lm-eval and /score disagree")


def documents(task: str, template: str, limit: int) -> list[dict[str, Any]]:
    """A question, its answer, and the pair of answer and input to choose from."""
    lines = (ROOT / "data" / "suite" / task / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {
            "question": template.replace("{input}", row["input"]),
            "answer": row["output"],
            "choices": [row["output"], row["input"]],
        }
        for row in rows[:limit]
    ]


def write_tasks(folder: Path, docs: list[dict[str, Any]]) -> None:
    """The two tasks and their data, as lm-eval reads them."""
    data = folder / "words.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    common = COMMON.format(data=data)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "likelihood.yaml").write_text(LIKELIHOOD + common)
    (folder / "tasks" / "generation.yaml").write_text(GENERATION + common)


def evaluated(programs: Path, folder: Path, served: Served, model: str, backbone: Path) -> Any:
    """lm-eval's results for one model, by task."""
    arguments = {
        "model": model,
        "base_url": f"http://127.0.0.1:{served.port}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": backbone.resolve(),
        "num_concurrent": 4,
        "max_retries": 1,
    }
    output = folder / f"results-{model}"
    command = [str(programs / "lm_eval"), "run", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    command += ["--tasks", "polyhead_likelihood,polyhead_generation"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(output)]
    run_offline([*command, "--batch_size", "8"], folder)
    (report,) = output.rglob("results_*.json")
    return json.loads(report.read_text())["results"]


def scored(served: Served, model: str, docs: list[dict[str, Any]]) -> float:
    """How often `/score` finds the first choice likelier, by the sum over its tokens as lm-eval."""
    right = 0
    for doc in docs:
        body = {"task": model, "prompt": doc["question"], "choices": doc["choices"]}
        status, data = served.call("POST", "/score", json.dumps(body).encode(), "application/json")
        assert status == 200, data
        first, second = (score["logprob"] for score in json.loads(data)["scores"])
        right += first > second
    return right / len(docs)


if __name__ == "__main__":
    main()

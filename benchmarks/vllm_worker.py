"""vLLM's engine in a process and a virtual environment of its own, told what to do line by line.

    python -P benchmarks/vllm_worker.py '{"model": ..., "adapters": [...], "engine": {...}}'

Each line of standard input is a list of requests, `[prompt ids, new tokens, adapter or null]`; each
line of the answer says what they took. It imports nothing of Polyhead.
"""

import json
import os
import sys
import time
from typing import Any

# One thread, in this process: a second process would spin on a core of its own.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def serve(said: dict[str, Any], channel: Any) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(model=said["model"], **said["engine"])
    adapters = [LoRARequest(f"t{i}", i + 1, path) for i, path in enumerate(said["adapters"])]
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in work]
        params = [
            SamplingParams(max_tokens=new, min_tokens=new, temperature=0, detokenize=False)
            for _, new, _ in work
        ]
        asked = [None if own is None else adapters[own] for _, _, own in work]
        began, clock = time.process_time(), time.perf_counter()
        answers = engine.generate(prompts, params, lora_request=asked, use_tqdm=False)
        took = {"cpu": time.process_time() - began, "clock": time.perf_counter() - clock}
        tokens = [list(answer.outputs[0].token_ids) for answer in answers]
        print(json.dumps({**took, "tokens": tokens}), file=channel, flush=True)


if __name__ == "__main__":
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to standard error
    serve(json.loads(sys.argv[1]), answers_to)

"""vLLM's side of `vllm_peer.py`, which starts it with the Python of vLLM's environment.

    python vllm_worker.py JOB.json RESULT.json

It imports vLLM and the standard library alone. Each batch size is decoded twice: the first
round warms up, the second is timed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import vllm  # pyrefly: ignore


def decode(llm: Any, prompts: list[list[int]], batch_size: int, job: dict[str, Any]) -> Any:
    """Greedy tokens of all prompts, `batch_size` of them at a time."""
    how = vllm.SamplingParams(
        temperature=0, max_tokens=job["max_new_tokens"], stop_token_ids=job["stop_ids"]
    )
    tokens = []
    for start in range(0, len(prompts), batch_size):
        batch = [{"prompt_token_ids": ids} for ids in prompts[start : start + batch_size]]
        made = llm.generate(batch, how, use_tqdm=False)
        tokens += [list(one.outputs[0].token_ids) for one in made]
    return tokens


def counted(llm: Any) -> dict[str, float]:
    """vLLM's counters of drafts and accepted tokens."""
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = ("num_drafts", "num_accepted_tokens")
    return {name: found.get(f"vllm:spec_decode_{name}", 0) for name in names}


def main() -> None:
    """Reads the job, decodes, and writes tokens, seconds and accepted lengths."""
    job = json.loads(Path(sys.argv[1]).read_text())
    llm = vllm.LLM(
        model=job["model"],
        dtype="float32",
        max_model_len=job["context"],
        max_num_seqs=max(job["batch_sizes"]),
        speculative_config=job["speculative_config"],
        enforce_eager=job["eager"],
        disable_log_stats=False,
    )
    results = []
    for batch_size in job["batch_sizes"]:
        decode(llm, job["prompts"], batch_size, job)
        before, start = counted(llm), time.perf_counter()
        tokens = decode(llm, job["prompts"], batch_size, job)
        seconds = time.perf_counter() - start
        after = counted(llm)
        drafts, accepted = (after[name] - before[name] for name in before)
        length = 1 + accepted / drafts if drafts else 1.0
        results.append({"tokens": tokens, "seconds": seconds, "mean_accepted_length": length})
    version = getattr(vllm, "__version__", "")
    Path(sys.argv[2]).write_text(json.dumps({"version": version, "results": results}))


if __name__ == "__main__":  # vLLM's processes import this file again
    main()

"""One start of the engine, in a process launched by `benchmarks.start`. The last line of output is JSON.

python -m benchmarks.first_token --checkpoint DIR --setting int8 --started SECONDS_SINCE_1970
"""

import argparse
import json
import time
from pathlib import Path

from autoglm.checkpoint import Checkpoint
from benchmarks import engines

PROMPT = 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--setting", required=True)
    parser.add_argument("--started", type=float, required=True, help="when the process was started")
    options = parser.parse_args()
    imported = time.time()
    checkpoint = Checkpoint.open(options.checkpoint)
    engine = engines.build_engine(checkpoint, options.setting)
    engine.start()
    ready = time.time()
    engines.answer_seconds(engine, [engines.random_prompt(checkpoint, PROMPT)], 1)
    end = time.time()
    stages = {"imports": imported - options.started, **{stage.name: stage.seconds for stage in engine.memory.stages}}
    stages["first token"] = end - ready
    stages["other"] = end - options.started - sum(stages.values())
    print(json.dumps({"stages": stages, "weights": engines.resident_bytes(engine.model_runner.model)}))
    engine.close()


if __name__ == "__main__":
    main()

"""One start: a process of its own, which `benchmarks.start` begins and whose last line of output is its stages.

python -m benchmarks.first_token --checkpoint DIR --setting int8 --began SECONDS_SINCE_1970
"""

import argparse
import json
import time
from pathlib import Path

from autoglm.checkpoint import Checkpoint
from benchmarks import engines

PROMPT = 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--setting", required=True)
    parser.add_argument("--began", type=float, required=True)
    options = parser.parse_args()
    imported = time.time()
    checkpoint = Checkpoint.open(options.checkpoint)
    engine = engines.build_engine(checkpoint, options.setting)
    engine.start()
    started = time.time()
    engines.answer_seconds(engine, [engines.random_prompt(checkpoint, PROMPT)], 1)
    ended = time.time()
    stages = {"imports": imported - options.began, **{stage.name: stage.seconds for stage in engine.memory.stages}}
    stages["first token"] = ended - started
    stages["the rest"] = ended - options.began - sum(stages.values())
    print(json.dumps({"stages": stages, "weights": engines.resident_bytes(engine.runner.model)}))
    engine.close()


if __name__ == "__main__":
    main()

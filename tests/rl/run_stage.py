"""`python run_stage.py FOLDER STAGE ENGINES`: one real RL stage of a nano model in FOLDER, to be killed by a test.

Prints a JSON line for every event and every logged step.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))
import torch
from rl_support import NANO, GlmMoeDsa, save_model, settings, tokenizer

from fullarc.chat import Message, render
from fullarc.config.context import StageContext
from fullarc.config.files import is_complete
from fullarc.config.stages import EngineSettings, SandboxSettings, TaskSettings
from fullarc.rl.stages import run_agentic, run_distil
from fullarc.tasks import demos

STAGES = {
    "distil": (run_distil, {"eta": 0, "teachers": {"reasoning": "a", "terminal": "b", "general": "a"}}),
    "agentic_rl": (run_agentic, {"eta": 1, "mix": {"terminal": 0.2, "compare": 0.8}}),
}
SIZES = {"steps": 8, "save_every": 3, "prompts": 6, "max_new_tokens": 24, "max_len": 480, "max_turns": 2}


def say(kind, **fields):
    print(json.dumps({"kind": kind, **fields}), flush=True)


def taught(model):
    """A few supervised steps on answers, so that some replies end and earn something."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = []
    for demo in demos("reasoning", 48, 0, ["compare"]):
        question, reply = demo["messages"]
        reply["reasoning_content"] = "x"
        messages = [Message.from_openai(question), Message.from_openai(reply)]
        rows.append(render(tokenizer(), messages, final_stop=True))
    for step in range(60):
        loss = 0.0
        for row in rows[step * 6 % 48 : step * 6 % 48 + 6]:
            ids, mask = torch.tensor([row.ids]), torch.tensor(row.loss_mask[1:], dtype=torch.bool)
            logits = model(ids[:, :-1]).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main(folder: Path, name: str, engines: int) -> None:
    config = NANO.model_copy(update={"vocab_size": tokenizer().vocab_size, "max_position_embeddings": 512})
    config = config.model_copy(update={"index_topk": 64, "eos_token_id": tuple(tokenizer().stop_ids)})
    torch.set_num_threads(1)
    if not is_complete(folder / "start"):
        tokenizer().save(folder / "tokenizer")
        for seed, target in ((2, "stages/a/checkpoint"), (3, "stages/b/checkpoint"), (1, "start")):
            model = GlmMoeDsa(config).init_weights(seed)
            save_model(taught(model) if target == "start" else model, folder / target, folder / "tokenizer")
    run, changes = STAGES[name]
    stage = settings(type=name, group_size=1 if name == "distil" else 4, engines=engines, **SIZES | changes)
    recipe = SimpleNamespace(
        engine=EngineSettings(), sandbox=SandboxSettings(), tasks=TaskSettings(), threads=1
    )
    ctx = StageContext(recipe, stage, name, folder, folder / "stages" / name, folder / "start", 0)
    ctx.log = lambda step, **metrics: say("step", step=step, **metrics)
    ctx.event = say
    run(ctx)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

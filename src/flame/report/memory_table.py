"""Largest memory that each rule of a study asks for, as a table."""

from flame.report.extent import VARIANTS, Extent
from flame.report.markdown import markdown_table
from flame.study import gpu_memory, memory
from flame.study.jobs import captioners_by_vllm, training_bundles

# A GPU for each job; a node of eight for a training. As in workflow/profiles/one-node.
GPU = memory.Machine(gpus=1, workers=11, batch_size=1024, token_budget="auto")
NODE = memory.Machine(gpus=8, workers=11)


def table(extent: Extent) -> str:
    """One line per rule, for the job of it that asks for most."""
    study, lines = extent.study, dict[str, list[str]]()
    vllm, training = captioners_by_vllm(study), training_bundles(study)
    asked: dict[str, int] = {}
    for rule, wildcards, _ in extent.planned:
        name = rule
        if rule == "embed" and wildcards["bundle"] in training:
            name = VARIANTS[0]
        if rule == "caption" and wildcards["captioner"] in vllm:
            name = VARIANTS[1]
        names = {key: "0" if key == "part" else value for key, value in wildcards.items()}
        machine = NODE if rule == "train" else GPU
        request = memory.request_mb(study, rule, names, machine)
        if request <= asked.get(name, 0):
            continue
        asked[name] = request
        parts = memory.of_job(study, rule, names, machine)
        what = max(parts, key=parts.__getitem__)
        card = gpu_memory.total(gpu_memory.of_job(study, rule, names, machine))
        lines[name] = [
            name,
            " ".join(value for key, value in wildcards.items() if key != "part"),
            f"{request / 1e3:,.1f} GB",
            f"{what}, {parts[what] / memory.GB:,.1f} GB",
            f"{card / memory.GB:,.1f} GB" if card else "",
        ]
    head = ["rule", "job that asks for most", "memory", "mostly for", "GPU memory"]
    ordered = [lines[name] for name in extent.jobs()]
    return markdown_table([head, ["---"] * len(head), *ordered])

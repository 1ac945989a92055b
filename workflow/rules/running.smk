"""How jobs run: the command of a stage, its memory and its time."""

from dataclasses import fields

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

from flame.study.memory import Machine, request_mb

HOUR = 60  # minutes, the unit of `runtime`


def growing(amount):
    """Time of a job, more with each retry: too little of it ends a job."""

    def resource(wildcards, attempt):
        return amount * attempt

    return resource


def memory(job):
    """MB of a job by formula (flame.study.memory), more with each retry."""

    def resource(wildcards, attempt, rulename):
        names = {name: "0" if name == "part" else value for name, value in wildcards.items()}
        return megabytes(job, machine(wildcards, rulename), **names) * attempt

    return resource


@cache
def megabytes(job, machine, **names):
    """The formula's; parts of a set need the same."""
    return request_mb(study, job, names, machine)


def machine(wildcards, rulename):
    """What the profile gives a rule's jobs of what decides their memory."""
    asked = workflow.get_rule(rulename).resources
    context = dict(input=[], attempt=1, threads=1, rulename=rulename, async_run=None)
    names = {field.name for field in fields(Machine)} | {"gpu", "gres", "nodes"}
    given = {name: asked[name].evaluate(wildcards, **context).value for name in names & {*asked}}
    gpus = gpus_of_node(given)
    return Machine(
        **{name: given[name] for name in given if hasattr(Machine, name)} | {"gpus": gpus}
    )


def dataset_minutes(wildcards, attempt):
    """Minutes that a download may take: at least five images a second."""
    return (12 * HOUR + study.datasets[wildcards.dataset].images // 300) * attempt


def all_cores(wildcards):
    """All cores of this machine, so that nothing else runs beside what is timed.

    Where jobs go to other machines there is no such number: 1, or what --set-threads says.
    """
    return workflow.resource_settings.cores or 1


def program(wildcards, output):
    """How a stage is called: by conda's Python, or by the one that runs Snakemake.

    It takes `output`, so that another machine or checkout is no reason to rerun a job.
    """
    by_conda = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    interpreter = "python" if by_conda else sys.executable
    return f"PYTHONPATH={SRC} {interpreter} -m" if SRC.is_dir() else f"{interpreter} -m"


def trainer(wildcards, output, resources, threads):
    """How training is called: by torchrun for several GPUs, and that by srun for several nodes.

    As in `program`, where it runs is no reason to rerun. The shell line is expanded on the first
    node, where the processes meet; Linux gives away no ports below 32768.
    """
    # On a CPU there is one process, too.
    nodes, gpus = resources.get("nodes", 1), max(gpus_of_node(resources), 1)
    if nodes == gpus == 1:
        return program(wildcards, output)
    torchrun = f"{program(wildcards, output)} torch.distributed.run --nproc-per-node={gpus}"
    if nodes == 1:
        return f"{torchrun} --standalone -m"
    if "mpi" not in resources.keys():
        raise WorkflowError(
            f"nodes={nodes} needs mpi=srun, which starts the others, and tasks={nodes}"
        )
    cores = resources.get("cpus_per_task", threads)
    return (
        f"{resources.mpi} --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1"
        f" --cpus-per-task={cores} --kill-on-bad-exit=1 env {torchrun} --nnodes={nodes}"
        " --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID"
        " --rdzv-endpoint=$(hostname):$((10000 + SLURM_JOB_ID % 20000)) -m"
    )


def gpus_of_node(resources):
    """GPUs of a job on each of its nodes; 0 for a job on a CPU, which asks for none."""
    if gres := resources.get("gres"):  # gpu, gpu:8 or gpu:<model>:8
        kind, _, rest = gres.partition(":")
        number = rest.rpartition(":")[2]
        return (int(number) if number.isdigit() else 1) if kind == "gpu" else 0
    gpus, nodes = resources.get("gpu", 0), resources.get("nodes", 1)
    if gpus % nodes:
        raise WorkflowError(f"gpu={gpus} cannot be spread evenly over nodes={nodes}")
    return gpus // nodes

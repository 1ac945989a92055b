"""A study and the names of a job -> the settings of its stage."""

from collections.abc import Iterable
from typing import Any

from flame.study.schema.runs import ClipRun, FlameRun, PretrainedRun
from flame.study.schema.tables import Measure
from flame.study.settings import (
    VERSION,
    AppendixSettings,
    CaptionSettings,
    CaptionsSettings,
    ClaimsSettings,
    ClipTraining,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    FewShotSettings,
    FigureSettings,
    FlameTraining,
    KnowledgeSettings,
    KnowledgeTableSettings,
    LongClipTraining,
    OverheadSettings,
    PretrainedTower,
    Probed,
    Reading,
    ReleasedTower,
    TableSettings,
    Training,
    ValidationSettings,
    VarianceSettings,
)
from flame.study.study import Study


def caption(study: Study, captioner: str, dataset: str, part: int) -> CaptionSettings:
    """Settings of one captioning job."""
    return CaptionSettings(
        dataset=dataset,
        part=part,
        parts=study.caption_parts(captioner, dataset),
        captioner=study.captioners[captioner],
        version=VERSION["caption"],
    )


def captions(study: Study, captioner: str, dataset: str) -> CaptionsSettings:
    """Settings of the job that joins the captions of a data set."""
    return CaptionsSettings(
        dataset=dataset,
        captioner=study.captioners[captioner],
        max_skipped=study.max_skipped,
        version=VERSION["caption"],
    )


def embed(study: Study, llm: str, bundle: str, kind: str, part: int) -> EmbedSettings:
    """Settings of one embedding job."""
    prompt = study.prompt_of(kind)
    return EmbedSettings(
        kind=kind,
        datasets=study.bundle_datasets(bundle, kind),
        part=part,
        parts=study.parts(bundle, kind),
        llm=llm,
        layer=study.llms[llm].layer,
        final_norm=study.llms[llm].final_norm,
        positions=study.embedding.positions,
        max_caption_tokens=study.embedding.max_caption_tokens,
        cleanup=study.embedding.cleanup,
        storage=study.embedding.storage,
        prefix=prompt.prefix,
        facets=study.suffixes(prompt, study.embedded_facets(llm, bundle, kind)),
        version=VERSION["embed"],
    )


def train(study: Study, training: str) -> Training:
    """Settings of one training."""
    run, seed, _ = study.trainings[training]
    assert not isinstance(run, PretrainedRun)
    shared: dict[str, Any] = {
        "run": training,
        "seed": seed,
        "dataset": study.dataset_of(training),
        "recipe": study.recipes[run.recipe],
        "max_skipped": study.max_skipped,
        "version": VERSION["train"],
    }
    if isinstance(run, FlameRun):
        backbone, targets = study.backbones[run.backbone], study.targets(training)
        return FlameTraining(backbone=backbone, targets=targets, **shared)
    clip = run if isinstance(run, ClipRun) else study.runs[run.base]
    assert isinstance(clip, ClipRun)
    shared |= {
        "method": run.method,
        "backbone": study.backbones[clip.backbone],
        "text_tower": study.text_towers[clip.text_tower],
    }
    if isinstance(run, ClipRun):
        return ClipTraining(captions=run.captions, **shared)
    own = run.model_dump(exclude={"method", "base", "dataset", "recipe", "seeds", "validation"})
    return LongClipTraining(**own, **shared)


def validation(study: Study, training: str) -> ValidationSettings:
    """Settings of what is validated during a training."""
    questions, chosen = study.validation_questions(training), study.validation_of(training)
    if chosen is None:
        return ValidationSettings()
    return ValidationSettings(questions=questions, every=chosen.every, images=chosen.images)


def tower(study: Study, training: str) -> PretrainedTower | ReleasedTower:
    """Settings of a tower that is downloaded, not trained."""
    run = study.run(training)
    if isinstance(run, PretrainedRun):
        return PretrainedTower(run=training, **run.model_dump(), version=VERSION["download"])
    trained = train(study, training)
    assert isinstance(run, FlameRun)
    assert isinstance(trained, FlameTraining)
    assert run.weights is not None
    return ReleasedTower(
        method="released", training=trained, weights=run.weights, version=VERSION["download"]
    )


def evaluate(study: Study, training: str, bundle: str) -> EvaluateSettings:
    """Settings of one evaluation."""
    return EvaluateSettings(
        run=training,
        questions=study.questions(training, bundle),
        precision=study.evaluation.precision,
        bootstrap=study.bootstrap,
        version=VERSION["evaluate"],
    )


def fewshot(study: Study, training: str, benchmark: str) -> FewShotSettings:
    """Settings of one few-shot job."""
    chosen = study.benchmarks[benchmark]
    assert chosen.fewshot is not None
    assert chosen.captions is not None
    return FewShotSettings(
        run=training,
        benchmark=benchmark,
        name=study.name_of(benchmark),
        dataset=chosen.dataset,
        captions=chosen.captions,
        fewshot=chosen.fewshot,
        final_norm=study.llms[study.flame_run(training).llm].final_norm,
        seed=study.seed,
        bootstrap=study.bootstrap,
        version=VERSION["fewshot"],
    )


def knowledge(study: Study, llm: str) -> KnowledgeSettings:
    """Settings of the probes of one LLM's embeddings."""
    block = study.knowledge
    assert block is not None
    return KnowledgeSettings(
        llm=llm,
        dataset=block.dataset,
        captions=block.captions,
        facets=study.prompt_of(block.captions).facets,
        attributes=tuple(block.attributes),
        folds=block.folds,
        penalties=block.penalties,
        seed=study.seed,
        bootstrap=study.bootstrap,
        version=VERSION["knowledge"],
    )


def probed(study: Study) -> Probed:
    """What the probes of all LLMs are shown with."""
    assert study.knowledge is not None
    facets = study.prompt_of(study.knowledge.captions).facets
    return Probed(
        block=study.knowledge,
        facets={name: study.facets[name] for name in facets},
        bootstrap=study.bootstrap,
    )


def knowledge_table(study: Study) -> KnowledgeTableSettings:
    """Settings of the table of what each prompt knows."""
    return KnowledgeTableSettings(study=study.study, probed=probed(study), version=VERSION["table"])


def overhead(study: Study) -> OverheadSettings:
    """Settings of what is timed for Figure 5."""
    assert study.overhead is not None
    flame = train(study, study.overhead.run)
    clip = train(study, study.overhead.baseline)
    assert isinstance(flame, FlameTraining)
    assert isinstance(clip, ClipTraining)
    llm, bundle = study.flame_run(study.overhead.run).llm, study.bundle(flame.dataset)
    return OverheadSettings(
        overhead=study.overhead,
        flame=flame,
        clip=clip,
        embedding=embed(study, llm, bundle, "long", 0),
        version=VERSION["overhead"],
    )


def export(study: Study, training: str) -> ExportSettings:
    """Settings of an exported run; it reads texts as its benchmarks do.

    Raises:
        ValueError: the run is not FLAME.
    """
    run = study.run(training)
    if not isinstance(run, FlameRun):
        raise ValueError(f"run {training!r} is not FLAME, and only FLAME is exported")
    read = {kind: (facets, kind) for kind, facets in study.targets(training).items()}
    for question in study.questions(training):
        if question.captions:
            read.setdefault(question.captions, (question.facets, str(question.center)))
    llm, embedding = study.llms[run.llm], study.embedding
    return ExportSettings(
        run=training,
        checkpoint=llm.checkpoint,
        reset=llm.reset,
        layer=llm.layer,
        final_norm=llm.final_norm,
        positions=embedding.positions,
        max_caption_tokens=embedding.max_caption_tokens,
        cleanup=embedding.cleanup,
        kinds={
            kind: Reading(
                prefix=study.prompt_of(kind).prefix,
                facets=study.suffixes(study.prompt_of(kind), facets),
                center=center,
            )
            for kind, (facets, center) in read.items()
        },
        version=VERSION["export"],
    )


def table(study: Study, name: str) -> TableSettings:
    """Settings of one table."""
    chosen, below = study.tables[name], study.claims_under(name)
    rows = tuple(row.model_copy(update={"label": study.label_of(row)}) for row in chosen.rows)
    measures = [*chosen.measures, *(m for claim in below for m in claim.measures)]
    return TableSettings(
        study=study.study,
        name=name,
        table=chosen.model_copy(update={"rows": rows}),
        claims=below,
        version=VERSION["table"],
        **_named(study, study.table_comparison(name)[0], measures),
    )


def variance(study: Study) -> VarianceSettings:
    """Settings of the list of variances."""
    measures = [measure for table in study.tables.values() for measure in table.measures]
    return VarianceSettings(
        study=study.study,
        tables={name: table.columns for name, table in study.tables.items()},
        version=VERSION["table"],
        **_named(study, study.variance_comparison()[0], measures),
    )


def claims(study: Study) -> ClaimsSettings:
    """Settings of the list of claims."""
    every = tuple(study.claims.values())
    measures = [measure for claim in every for measure in claim.measures]
    return ClaimsSettings(
        study=study.study,
        claims=every,
        probed=probed(study) if any(claim.knows for claim in every) else None,
        version=VERSION["table"],
        **_named(study, study.claims_comparison(every)[0], measures),
    )


def appendix(study: Study, name: str) -> AppendixSettings:
    """Settings of a table of the study itself."""
    chosen = study.appendix[name]
    backbones = {
        run.backbone: None
        for run in study.runs.values()
        if isinstance(run, FlameRun | ClipRun) and run.recipe == chosen.recipe
    }
    return AppendixSettings(
        study=study.study,
        name=name,
        table=chosen,
        recipe=study.recipes[chosen.recipe] if chosen.recipe else None,
        backbones=tuple(backbones),
        facets=study.facets,
        prompts=study.prompts,
        version=VERSION["table"],
    )


def figure(study: Study, name: str) -> FigureSettings:
    """Settings of one figure."""
    chosen = study.figures[name]
    return FigureSettings(
        study=study.study,
        name=name,
        figure=chosen,
        version=VERSION["figure"],
        **chosen.resolved(study),
        **_named(study, *chosen.uses()),
    )


def _named(study: Study, runs: Iterable[str], measures: Iterable[Measure]) -> dict[str, Any]:
    """What names of runs and of benchmarks stand for."""
    benchmarks = dict.fromkeys(measure.benchmark for measure in measures)
    return {
        "datasets": {name: study.benchmarks[name].dataset for name in benchmarks},
        "stand_ins": tuple(filter(study.is_stand_in, benchmarks)),
        "runs": {run: study.compared(run) for run in dict.fromkeys(runs)},
    }

"""One experiment: plan, check, train stage by stage, evaluate, compare, record, report."""

import datetime
import json
import math
import os
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align import launch
from align.artifact import METRICS, SAMPLES, Job, Manifest
from align.gate import pass_gate, suites_index
from align.plan import ACCURACY, STAGES, Plan, make_plan, preflight
from align.ppo import limits
from align.probe import Alarm, finding_of
from align.ratings import rate
from align.stages.checkpoints import folder_of, latest
from align.stages.rescore import RESCORE
from conf.entry import UserError, plain
from conf.schema import Align
from evals.deltas import compare
from evals.rated import FOLDER, PAGE, PAIRS, REPORT, main_figures, rated_text
from evals.report import build_report, leaderboard_rows
from evals.results import EvalResult
from evals.site.card import write_card
from evals.site.courses import looks_file
from evals.site.curves import metrics_file
from evals.site.rollouts import samples_file
from evals.track import Tracker, redact
from evals.worker import request_to_json
from reward.looks import LOOKS
from reward.store import (
    MANIFEST,
    build_once,
    content_key,
    fingerprint,
    is_complete,
    read_json,
    write_json,
)
from reward.versions import AUDIT

# Overrides that say which run this is or where it goes, not which arm of the experiment.
_NOT_AN_ARM = re.compile(
    r"^\+*(experiment|seed|paths|track|launch|plan_only|offline|hydra|name|title)\b"
)


def run(config: Align, overrides: list[str]) -> float | None:
    """Carry out an experiment and leave its records and the leaderboard.

    Returns:
        The objective for a sweeper: the named score, or the mean gain of the last policy on the gain suites.
    """
    plan = make_plan(config)
    preflight(config, plan)
    print(_plan_text(plan, Path(config.paths.root)))
    if config.plan_only:
        return None
    started = time.time()
    experiment = _Run(config, overrides, plan)
    experiment.check_data()
    stages = [experiment.train(job) for job in plan.jobs]
    if config.launch.node_rank > 0:
        return None  # machine 0 evaluates
    rewards = experiment.rate()
    results = experiment.evaluate()
    if unused := _unused_margins(config, results):
        print(
            f"{'evaluate':10} warning: evaluation.margins names {unused}, of which nothing was measured"
        )
    experiment.record(stages, results, rewards, started)
    runs = Path(config.paths.root) / "runs" / config.name
    page = build_report(runs, Path(config.paths.root) / "report" / config.name)
    if experiment.has_worked:
        experiment.tracker.leaderboard(leaderboard_rows(runs))
    if summary := _summary(results, config, plan.final):
        print(summary)
    for job in plan.jobs:
        if finding := finding_of(job.out):
            print(f"{job.stage:10} {finding.verdict}: {finding.sentence()}")
    for figures in rewards.values():
        print(f"reward model: {rated_text(figures)}")
    print(page.resolve())
    return _objective(results, rewards, config, plan)


def _unused_margins(config: Align, results: dict[tuple[str, str, str], EvalResult]) -> str:
    """Names of margins that are of no task and no metric."""
    scores = [score for result in results.values() for score in result.scores]
    known = {name for s in scores for name in (s.task, s.metric, f"{s.task}/{s.metric}")}
    return ", ".join(sorted(config.evaluation.margins.keys() - known))


def _plan_text(plan: Plan, root: Path) -> str:
    """What will be done and what is there already."""
    lines = []
    for job in plan.jobs:
        state = "done" if is_complete(job.out) else "to do"
        rows = plan.data[job.stage]
        start = next(iter(job.parents))
        lines.append(
            f"{job.stage:10} {state:6} from {start}, {len(rows):,} rows ({rows.manifest['format']}, "
            f"{rows.folder.name})  {job.key}"
        )
        if job.reward:
            lines.append(f"{'':17} {_ppo_text(job)}")
    # Before its model exists, an evaluation has no key, and is surely still to do.
    done = sum(
        (policy == "base" or is_complete(Path(request.model.path)))
        and is_complete(request.folder(root))
        for policy, request in plan.evaluations
    )
    lines.append(f"{'evaluate':10} {len(plan.evaluations) - done} of {len(plan.evaluations)} to do")
    return "\n".join(lines)


def _ppo_text(job: Job) -> str:
    """What PPO will push, and how long."""
    assert job.reward is not None
    args = limits.settings_of(job.args)
    steps = args["num_rollouts"] * args["num_ppo_epochs"] * args["num_mini_batches"]
    terms = [f"{term.weight:g} × {term.kind}" for term in job.reward.terms.values()]
    critic = "a reward model" if job.value else "the policy"
    return (
        f"reward {' + '.join(terms)}; {args['num_rollouts']} rollouts of {args['rollout_batch_size']} responses, "
        f"{steps:,} steps; β {args['kl_coef']:g}; the critic starts as {critic}"
    )


class _Run:
    """One arm with one seed: its folder, its log files, its tracker."""

    def __init__(self, config: Align, overrides: list[str], plan: Plan) -> None:
        self.config, self.overrides, self.plan = config, overrides, plan
        self.root = Path(config.paths.root)
        record = plain(config)
        for key in ("paths", "track", "plan_only", "title", "offline"):
            del record[key]
        if config.probe is None:
            del record["probe"]
        record["launch"] = {"processes": config.launch.nnodes * config.launch.nproc_per_node}
        self.key = content_key(record)
        arm = ", ".join(o.lstrip("+") for o in overrides if not _NOT_AN_ARM.match(o))
        self.label = str(redact(arm))
        self.arm = _arm(record)
        self.folder = (
            self.root
            / "runs"
            / config.name
            / f"{_slug(self.label) or 'run'}-seed{config.seed}-{self.key[:8]}"
        )
        self.has_worked = False
        self.audits: dict[str, Path] = {}  # stage → folder
        self.tracker = Tracker(config.track, config.name, self.root, record | {"arm": self.label})

    def check_data(self) -> None:
        """Pass the gate with every stage's rows before the first stage starts.

        Raises:
            UserError: if a stage cannot be trained on its rows.
        """
        if any(not is_complete(job.out) for job in self.plan.jobs):
            print(
                f"{'data':10} checking the rows against the tokenizer, the held-out rows and the suites"
            )
        index = suites_index(self.config) if self.plan.jobs else None
        for job in self.plan.jobs:
            self.audits[job.stage] = pass_gate(job, self.config, index)
            if not is_complete(job.out):
                facts = self.plan.data[job.stage].facts()
                print(
                    f"{job.stage:10} {_findings_line(self.audits[job.stage], set(facts['row'].tolist()))}"
                )
                if job.stage == "rm" and (told := _margin_line(facts["margin"].tolist())):
                    print(f"{job.stage:10} {told}")

    def train(self, job: Job) -> dict[str, Any]:
        """The record of a stage, built unless it is there."""
        is_reused = is_complete(job.out)
        if not is_reused:
            self.has_worked = True
            if self.config.launch.node_rank > 0:
                self._join(job)
            else:
                build_once(job.out, lambda partial: self._train_once(job, partial))
        if self.config.launch.node_rank == 0:
            shutil.rmtree(folder_of(job), ignore_errors=True)
        manifest = Manifest.load(job.out)
        if raised := [name for name in manifest.metrics if name.startswith("alarm/")]:
            log = self._log(job.stage)
            where = (
                f"{log} says what went wrong" if log.is_file() else "it was so in an earlier run"
            )
            print(f"{job.stage:10} warning: {', '.join(raised)}: {where}, docs/ppo.md what to do")
        finding = finding_of(job.out)
        return {
            "stage": job.stage,
            "key": job.key,
            "seconds": manifest.seconds,
            "reused": is_reused,
            "metrics": manifest.metrics,
            "data": manifest.data,
            "method": job.peft.method if job.peft.method != "none" else "full",
            "parameters": manifest.parameters,
            **({"overoptimization": finding.to_json()} if finding else {}),
            "rescored": manifest.rescored,
        }

    def _train_once(self, job: Job, partial: Path) -> dict[str, Any]:
        name = f"{self.label} {job.stage}".strip()
        with self.tracker.run(name, "train") as live:
            rows, looks, alarm = _Tail(partial / METRICS), _Tail(partial / LOOKS), Alarm(job.stage)

            def mirror() -> None:
                logged = [(int(row["step"]), _without(row, "step")) for row in rows.new()]
                logged += [(int(row["step"]), alarm.hear(row)) for row in looks.new()]
                for step, values in sorted(logged, key=lambda one: one[0]):  # W&B goes forward only
                    live.log(values, step=step)

            self._start(job, partial, mirror)
            manifest: dict[str, Any] = read_json(partial / MANIFEST)
            if samples := _Tail(partial / SAMPLES).new():
                live.table("samples", samples)
            if program := STAGES[job.stage].check:
                manifest["rescored"] = self._check(program, job, partial)
            live.summarise(manifest["metrics"] | {"key": job.key})
            if finding := finding_of(partial):
                live.summarise({"probe/finding": finding.verdict, "probe/told": finding.sentence()})
        return manifest

    def _log(self, name: str) -> Path:
        """The file that receives what a worker prints."""
        return self.folder / "logs" / f"{name}.log"

    def _check(self, program: str, job: Job, partial: Path) -> dict[str, Any]:
        """What a fresh process finds in what a stage made; it fails when that is not what was trained."""
        log = self._log(f"{job.stage}-check")
        launch.run(launch.command(program, [str(partial)]), f"{job.stage} check", log)
        found: dict[str, Any] = read_json(partial / RESCORE)
        (partial / RESCORE).unlink()
        return found

    def _start(self, job: Job, partial: Path, watch: Callable[[], None] = lambda: None) -> None:
        settings = self.config.launch
        name = job.stage if settings.node_rank == 0 else f"{job.stage}-node{settings.node_rank}"
        log = self._log(name)
        spec = log.parent / f"{name}.job.json"
        spec.parent.mkdir(parents=True, exist_ok=True)
        write_json(spec, job.to_json(partial))
        argv = launch.command("align.worker", [str(spec)], settings)
        launch.run(argv, job.stage, log, settings.nproc_per_node, watch, lambda: _kept(job))
        if settings.node_rank == 0 and not (partial / MANIFEST).is_file():
            raise UserError(f"{job.stage} ended without a result; see {log}")

    def _join(self, job: Job) -> None:
        """On a further machine: take part in the training that machine 0 publishes on the shared file system."""
        self._start(job, job.out.parent / f".{job.out.name}.partial")
        patience = time.monotonic() + 600
        while not is_complete(job.out):
            if time.monotonic() > patience:
                raise UserError(
                    f"{job.stage}: machine 0 published no {job.out}; "
                    "paths.root must be on a file system that all machines share"
                )
            time.sleep(1)

    def rate(self) -> dict[str, dict[str, float]]:
        """The main figures of each reward model on held-out pairs, by stage; the report goes to the run's folder."""
        found = {}
        for job in self.plan.jobs:
            log = self._log(f"{job.stage}-report")
            if (report := rate(job, self.root, log)) is None:
                continue
            found[job.stage] = main_figures(report)
            kept = self.folder / FOLDER / job.stage
            kept.mkdir(parents=True, exist_ok=True)
            if any(_differ(report / name, kept / name) for name in (REPORT, PAGE, PAIRS)):
                self.has_worked = True
                for name in (REPORT, PAGE, PAIRS):
                    shutil.copyfile(report / name, kept / name)
                title = f"{self.label} {job.stage} report".strip()
                self.tracker.reward_model(title, found[job.stage])
        return found

    def evaluate(self) -> dict[tuple[str, str, str], EvalResult]:
        """Results by (policy, quantizer, suite); what is missing is measured in one worker process."""
        missing = [r for _, r in self.plan.evaluations if not is_complete(r.folder(self.root))]
        if missing:
            self.has_worked = True
            spec = self.folder / "logs" / "evaluate.requests.json"
            spec.parent.mkdir(parents=True, exist_ok=True)
            write_json(spec, [request_to_json(request, self.root / "cache") for request in missing])
            argv = launch.command("evals.worker", [str(spec), str(self.root)])
            kept = "the answers so far are kept, and the same command continues"
            launch.run(argv, "evaluate", spec.parent / "evaluate.log", kept=lambda: kept)
        results = {}
        for policy, request in self.plan.evaluations:
            result = EvalResult.load(request.folder(self.root))
            results[policy, request.quantizer, request.suite.name] = result
            if request in missing:
                self.tracker.evaluation(
                    f"{self.label} {policy} {request.quantizer} {request.suite.name}".strip(),
                    result,
                )
        return results

    def _recorded(self) -> str | None:
        """What the record that is there was made of; the same settings may have read other bytes."""
        file = self.folder / "run.json"
        return read_json(file).get("made_of") if file.is_file() else None

    def record(
        self,
        stages: list[dict[str, Any]],
        results: dict[tuple[str, str, str], EvalResult],
        rewards: dict[str, dict[str, float]],
        started: float,
    ) -> None:
        """Copy results and training logs into the run's folder, write `run.json`, and a model card beside it.

        A run that found everything done leaves the record of the run that did it.
        """
        from evals.provenance import provenance

        made_of = content_key(
            [
                [job.key for job in self.plan.jobs],
                [result.folder.name for result in results.values()],
                [self.audits[job.stage].name for job in self.plan.jobs],
                self.config.title,
            ]
        )
        if not self.has_worked and self._recorded() == made_of:
            return
        evaluations = []
        for (policy, quantizer, suite), result in results.items():
            path = Path("evals") / f"{policy}-{quantizer}-{suite}"
            shutil.copytree(result.folder, self.folder / path, dirs_exist_ok=True)
            evaluations.append(
                {"policy": policy, "quantizer": quantizer, "suite": suite, "path": str(path)}
            )
        for job in self.plan.jobs:
            folder = self.folder / "data" / job.stage
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.audits[job.stage] / AUDIT, folder / AUDIT)
            shutil.copyfile(job.data / MANIFEST, folder / MANIFEST)
            places = ((METRICS, metrics_file), (LOOKS, looks_file), (SAMPLES, samples_file))
            for name, place in places:
                if (log := job.out / name).is_file():
                    kept = place(self.folder, job.stage)
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(log, kept)
        config = self.config
        write_json(self.folder / "config.json", redact(plain(config)))
        record = {
            "made_of": made_of,
            "experiment": config.name,
            "title": config.title,
            "label": self.label,
            "arm": self.arm,
            "seed": config.seed,
            "overrides": self.overrides,
            "command": "python -m align " + shlex.join(self.overrides),
            "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(
                timespec="seconds"
            ),
            "seconds": round(time.time() - started, 1),
            "margin": config.evaluation.margin,
            "margins": config.evaluation.margins,
            "family": config.evaluation.family,
            "model": {"path": config.model.path, "dtype": config.model.dtype.value},
            "stages": stages,
            "policies": list(self.plan.policies),
            "evaluations": evaluations,
            "rewards": rewards,
            "provenance": provenance(),
        }
        write_json(self.folder / "run.json", redact(record))
        write_card(self.folder / "run.json")


class _Tail:
    """The rows that were appended to a JSONL file since the last look; all of them where it was begun anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> list[dict[str, Any]]:
        """Complete new rows."""
        if not self._path.is_file():
            self._offset = 0
            return []
        with self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                self._offset = 0
            file.seek(self._offset)
            block = file.read()
        end = block.rfind(b"\n") + 1
        self._offset += end
        return [json.loads(line) for line in block[:end].splitlines()]


def _kept(job: Job) -> str:
    """What a stage that failed leaves."""
    if checkpoint := latest(job):
        return f"{checkpoint.name} is kept, and the same command continues from it"
    return "nothing was kept of it"


def _arm(config: dict[str, Any]) -> str:
    """Names the arm: the config without any training seed."""
    stages = {
        name: config[name] | {"args": _without(config[name]["args"], "seed")} for name in STAGES
    }
    return content_key(_without(config | stages, "seed"))[:8]


def _without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def _margin_line(margins: list[float]) -> str:
    """What the margins of the rows do to the loss; empty when there is not one for every row."""
    if not margins or not all(map(math.isfinite, margins)):
        return ""
    mean = math.fsum(margins) / len(margins)
    return (
        f"the rows' margins (mean {mean:.3g}) are subtracted from the difference of the scores in the loss; "
        "drop the column `margin` to train without them"
    )


def _findings_line(audit: Path, rows: set[int]) -> str:
    """How many findings of which kind on the rows that are left, most first."""
    findings = [f for f in read_json(audit / AUDIT)["findings"] if f["row"] in rows]
    counts = Counter(finding["kind"] for finding in findings if finding["severity"] != "note")
    return "rows: " + (
        ", ".join(f"{n:,} {kind}" for kind, n in counts.most_common()) or "no findings"
    )


def _differ(file: Path, kept: Path) -> bool:
    return not kept.is_file() or fingerprint(file) != fingerprint(kept)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", text)[:80].strip("-")


def _summary(results: dict[tuple[str, str, str], EvalResult], config: Align, final: str) -> str:
    """Base against the last policy, main metrics only, as text."""
    if final == "base":
        return ""
    lines = []
    for suite in config.evaluation.suites:
        baseline, candidate = results["base", "none", suite], results[final, "none", suite]
        judging = config.evaluation
        for delta in compare(baseline, candidate, judging.margin, margins=judging.margins):
            if delta.is_main:
                lines.append(
                    f"{delta.task:20} {delta.metric:11} "
                    f"base {delta.baseline:.3f} → {final} {delta.candidate:.3f}  "
                    f"{delta.difference:+.3f} [{delta.ci_low:+.3f}, {delta.ci_high:+.3f}]  "
                    f"n={delta.n}  {delta.verdict}"
                )
    return "\n".join(lines)


def _objective(
    results: dict[tuple[str, str, str], EvalResult],
    rewards: dict[str, dict[str, float]],
    config: Align,
    plan: Plan,
) -> float | None:
    wanted = config.evaluation.objective
    if wanted == ACCURACY:
        return rewards["rm"]["accuracy"]
    if wanted:
        for (policy, quantizer, suite), result in results.items():
            for score in result.scores:
                if (
                    policy == plan.final
                    and quantizer == "none"
                    and f"{suite}/{score.task}/{score.metric}" == wanted
                ):
                    return score.value
        raise UserError(
            f"evaluation.objective={wanted!r} is no SUITE/TASK/METRIC that was measured"
        )
    gains = [
        delta.difference if delta.higher_is_better else -delta.difference
        for suite, settings in config.evaluation.suites.items()
        if settings.role.value == "gain" and plan.final != "base"
        for delta in compare(results["base", "none", suite], results[plan.final, "none", suite])
        if delta.is_main and not math.isnan(delta.difference)
    ]
    return sum(gains) / len(gains) if gains else None

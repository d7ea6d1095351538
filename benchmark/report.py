"""Tables and learning curves from run directories.

    python benchmark/report.py runs                    # every run below runs/ -> runs/report/
    python benchmark/report.py runs --out benchmark/results/pointmaze

Writes report.md and one picture of learning curves per kind of data. Runs on official data, on
collected data, on generated data and without a dataset never share a table. A score is one seed's
mean over the episodes of its final evaluation. Columns:

  mean, deviation   over all seeds (deviation with n - 1)
  IQM               mean of the middle half of the scores: floor(n / 4) of them fall away at each
                    end, so with fewer than 4 scores it is the mean
  95% interval      of the IQM: percentile bootstrap, seeds drawn with replacement within each task
  last three        mean of the last three evaluations, of the headline metric
  published         somebody else's number and where it stands: never part of any figure of ours

Runs are one method if they share the script, the launcher's label and every argument but the seed;
where a label stands for several settings, the arguments in which they differ are named. Several
finished runs of the same seed count once, the newest.
"""

import collections
import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
NOT_A_SETTING = ("env_id", "seed", "num_seeds", "out_dir", "resume", "evaluate", "dataset_dir")
COLUMN = {"training_return": "charts/episodic_return"}  # mean of the last training episodes
KINDS = ("official", "collected", "generated", "none")
TITLES = {
    "official": "Official datasets",
    "collected": "Collected datasets (not comparable with published numbers)",
    "generated": "Generated data",
    "none": "No dataset (online only)",
}


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ("runs",)  # directories to search for runs
    out: str | None = None  # where the report goes (default: report/ in the first directory)
    published: str = str(HERE / "published.json")  # numbers of others, a source each
    resamples: int = 10_000  # of the bootstrap
    pictures: bool = True  # draw learning curves


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory; `scores` maps a metric to one score per seed, in the order of `seeds`."""

    directory: Path
    facts: dict  # args.json
    result: dict | None  # result.json, None where the run has not ended
    label: str

    @property
    def args(self):
        return self.facts["args"]

    @property
    def kind(self):
        """The table it belongs to: official, collected, generated or none."""
        source = self.facts["dataset_source"]
        return next((kind for kind in KINDS if source.startswith(kind)), "none")

    @property
    def settings(self):
        """The arguments that make it this method, as one comparable value."""
        kept = {k: v for k, v in self.args.items() if k not in NOT_A_SETTING}
        return json.dumps(kept, sort_keys=True)

    def scores(self):
        """{metric: {seed: score}} of the final evaluation, and of the last training episodes."""
        episodes = self.result["episodes"].items()
        seeds = self.result["seeds"]
        scores = {k: dict(zip(seeds, np.mean(v, axis=1), strict=True)) for k, v in episodes}
        for row in self.rows():
            if row.get(COLUMN["training_return"]):
                last = scores.setdefault("training_return", {})
                last[int(row["seed"])] = float(row[COLUMN["training_return"]])
        return scores

    def rows(self):
        """The lines of metrics.csv."""
        with open(self.directory / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))


@dataclasses.dataclass
class Group:
    """All runs of one method on one task."""

    task: str
    label: str
    runs: list

    @property
    def args(self):
        return self.runs[0].args

    def scores(self):
        """{metric: array of one score per seed}; the newest run of a seed counts."""
        merged = collections.defaultdict(dict)
        for run in self.runs:
            for metric, by_seed in run.scores().items():
                merged[metric] |= by_seed
        return {k: np.array([v[seed] for seed in sorted(v)]) for k, v in merged.items()}

    def modes(self):
        """Metrics to report: every mode's success, or its return where there is no success."""
        names = list(self.scores())
        return [n for n in names if n.startswith("success")] or [n for n in names if "return" in n]


# ---- statistics ----
def interquartile_mean(scores):
    """Mean of what is left when floor(n / 4) of the n scores fall away at each end."""
    scores = np.sort(np.ravel(scores))
    cut = len(scores) // 4
    return scores[cut : len(scores) - cut].mean()


def bootstrap_interval(tasks, resamples, seed=0, level=0.95):
    """Percentile interval of the IQM over the pooled scores of `tasks` (list of 1-D arrays).

    Stratified: each resample draws, within each task, as many seeds as it has, with replacement.
    """
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(s), size=(resamples, len(s))) for s in tasks]
    pooled = np.concatenate([s[i] for s, i in zip(map(np.asarray, tasks), draws, strict=True)], 1)
    pooled.sort(axis=1)
    cut = pooled.shape[1] // 4
    means = pooled[:, cut : pooled.shape[1] - cut].mean(axis=1)
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2])


# ---- reading ----
def read_runs(roots):
    """All run directories below some directories -> list of Run, oldest first."""
    runs = []
    for path in sorted({p for root in roots for p in Path(root).rglob("args.json")}):
        facts, result = json.loads(path.read_text()), path.with_name("result.json")
        launched = path.parent.parent / "launch.json"
        label = json.loads(launched.read_text())["label"] if launched.is_file() else facts["algo"]
        result = json.loads(result.read_text()) if result.is_file() else None
        runs.append(Run(path.parent, facts, result, label))
    return sorted(runs, key=lambda run: run.directory.stat().st_mtime)


def group_runs(runs):
    """Finished runs -> {kind of data: [Group]}, sorted; equal labels are told apart."""
    by_key = collections.defaultdict(list)
    for run in runs:
        if run.result:
            key = (run.kind, run.facts["task"], run.label, run.facts["algo"], run.settings)
            by_key[key].append(run)
    groups = collections.defaultdict(list)
    for (kind, task, label, _, _), members in sorted(by_key.items()):
        groups[kind].append(Group(task, label, members))
    for members in groups.values():
        tell_apart(members)
    return groups


def tell_apart(groups):
    """Where one label stands for several settings on a task, add what differs to the labels."""
    same = collections.defaultdict(list)
    for group in groups:
        same[group.task, group.label].append(group)
    for members in same.values():
        names = {k for g in members for k in g.args if k not in NOT_A_SETTING}
        values = {n: {json.dumps(g.args.get(n)) for g in members} for n in names}
        differing = sorted(n for n in names if len(values[n]) > 1)
        for group in members if len(members) > 1 else ():
            group.label += " " + " ".join(f"{n}={group.args.get(n)}" for n in differing)


def read_curves(group, column):
    """Evaluations of a group: steps (T,), seconds (T,), values (T, seeds) of the common steps."""
    points = collections.defaultdict(dict)
    for run in group.runs:
        for row in run.rows():
            if row.get(column):
                point = (float(row["time/train_seconds"]), float(row[column]))
                points[int(row["step"])][int(row["seed"])] = point
    if not points:
        return np.zeros(0), np.zeros(0), np.zeros((0, 0))
    full = max(len(p) for p in points.values())
    steps = sorted(s for s, p in points.items() if len(p) == full)
    table = np.array([[points[s][seed] for seed in sorted(points[s])] for s in steps])
    return np.array(steps), table[..., 0].mean(axis=1), table[..., 1]


# ---- published numbers ----
def published_entries(published, group, metric):
    """Others' numbers for a method, task and metric -> [(method, value text, source)]."""
    found = []
    for entry in published["results"]:
        value = entry["values"].get(group.args["env_id"])
        fits = all(group.args.get(k) == v for k, v in entry["where"].items())
        online = bool(group.args.get("online_steps"))
        if value is None or group.runs[0].facts["algo"] != entry["script"] or not fits:
            continue
        if entry["online"] == online and entry["metric"] == metric:
            text = f"{value[0]:.2f} ± {value[1]:.2f}" if isinstance(value, list) else f"{value:.3f}"
            found.append((entry["method"], text, entry["source"]))
    return found


# ---- writing ----
def markdown_table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def spread(scores):
    return f" ± {scores.std(ddof=1):.2f}" if len(scores) > 1 else ""


def row_of(group, metric, published, cited, resamples):
    """One line of a table; the published numbers' sources are added to `cited`."""
    scores = group.scores()[metric]
    low, high = bootstrap_interval([scores], resamples)
    results = [run.result for run in group.runs]
    headline = f"eval/{metric}_last_three"
    last = [r[headline] for r in results if headline in r for _ in r["seeds"]]
    theirs = []
    for method, text, source in published_entries(published, group, metric):
        cited.setdefault(source, len(cited) + 1)
        theirs.append(f"{method} {text} [{cited[source]}]")
    seconds = [r["train_seconds"] for r in results]
    episodes = {len(e) for r in results for e in r["episodes"].get(metric, ())}
    return (
        group.task.removesuffix("-v0"),
        group.label,
        metric,
        len(scores),
        "/".join(map(str, sorted(episodes))),
        f"{scores.mean():.2f}{spread(scores)}",
        f"{interquartile_mean(scores):.2f} [{low:.2f}, {high:.2f}]",
        f"{np.mean(last):.2f}" if last else "",
        f"{results[-1]['steps']:,}",
        f"{np.mean(seconds):,.0f} s",
        "; ".join(theirs),
    )


HEADER = ("task", "method", "metric", "seeds", "episodes", "mean ± deviation", "IQM [95%]")
HEADER += ("last three", "steps", "training time", "published, not ours")


def over_tasks(groups, resamples):
    """Rows that pool the tasks of a method, where it was run on at least two."""
    pooled = collections.defaultdict(dict)
    for group in groups:
        for metric in group.modes():
            if metric.startswith("success"):  # returns of different tasks have no common scale
                pooled[group.label, metric][group.task] = group.scores()[metric]
    rows = []
    for (label, metric), tasks in pooled.items():
        if len(tasks) > 1:
            low, high = bootstrap_interval(list(tasks.values()), resamples)
            scores = np.concatenate(list(tasks.values()))
            means = np.mean([s.mean() for s in tasks.values()])
            iqm = f"{interquartile_mean(scores):.2f} [{low:.2f}, {high:.2f}]"
            rows.append((label, metric, len(tasks), len(scores), f"{means:.2f}", iqm))
    return rows


def write_tables(groups, published, resamples):
    """The tables of all kinds of data as Markdown lines."""
    lines, cited = [], {}
    for kind in KINDS:
        if not groups.get(kind):
            continue
        members = groups[kind]
        rows = [
            row_of(group, metric, published, cited, resamples)
            for group in members
            for metric in group.modes()
        ]
        lines += [f"## {TITLES[kind]}", "", *markdown_table(HEADER, rows), ""]
        if pooled := over_tasks(members, resamples):
            header = ("method", "metric", "tasks", "scores", "mean over tasks", "IQM [95%]")
            lines += ["All tasks of a method together:", "", *markdown_table(header, pooled), ""]
        facts = [(run.facts, run.result) for group in members for run in group.runs]
        for name in ("device", "commit", "dataset_source"):
            values = sorted({str(f[name]) for f, _ in facts})
            lines += [f"{name}: {', '.join(values)}  "]
        timings = {f["args"].get("success_timing") for f, _ in facts} - {None}
        lines += [f"success timing: {', '.join(sorted(timings)) or 'none'}", ""]
        lines += [f"![learning curves](curves_{kind}.png)", ""]
    return lines + write_sources(groups, published, cited)


def write_sources(groups, published, cited):
    """Footnotes of the cited sources, averages of others, and why a column may be empty."""
    scripts = {run.facts["algo"] for g in groups.values() for group in g for run in group.runs}
    official = {run.facts["algo"] for group in groups.get("official", ()) for run in group.runs}
    averages, lines = [a for a in published["averages"] if a["script"] in official], []
    if averages:
        rows = []
        for a in averages:
            cited.setdefault(a["source"], len(cited) + 1)
            interval = a.get("interval")
            text = f"{a['value']:.3f}" + (f" [{interval[0]}, {interval[1]}]" if interval else "")
            rows.append((a["method"], a["over"], text, f"[{cited[a['source']]}]"))
        lines += ["## Averages that others published (not ours)", ""]
        lines += [*markdown_table(("method", "over", "success", "source"), rows), ""]
    for script in sorted(scripts & set(published["nothing_published"])):
        lines += [f"Published column of {script}: {published['nothing_published'][script]}.", ""]
    for source, number in sorted(cited.items(), key=lambda item: item[1]):
        s = published["sources"][source]
        lines += [f"[{number}] {s['title']}. Protocol: {s['protocol']}. Caveat: {s['caveat']}.  "]
    return lines


def draw_curves(groups, path):
    """A row per task: mean over seeds with its IQM's 95% interval, by step and by wall-clock."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = sorted({group.task for group in groups})
    figure = Figure(figsize=(12, 3.4 * len(tasks)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for task, row in zip(tasks, axes, strict=True):
        for group in (g for g in groups if g.task == task):
            for metric in group.modes():
                steps, seconds, values = read_curves(group, COLUMN.get(metric, f"eval/{metric}"))
                if not len(steps):
                    continue
                band = np.array([bootstrap_interval([v], 1_000) for v in values])
                mode = metric.partition("_")[2]
                name = f"{group.label} {mode} ({values.shape[1]})".replace("  ", " ")
                for axis, x in zip(row, (steps, seconds), strict=True):
                    (line,) = axis.plot(x, values.mean(axis=1), marker=".", label=name)
                    axis.fill_between(x, *band.T, color=line.get_color(), alpha=0.15, lw=0)
                offline = group.args.get("offline_steps")
                if offline and group.args.get("online_steps"):
                    row[0].axvline(offline, c="grey", ls=":", lw=1)
        row[0].set(title=task, ylabel=group_metric(groups, task), xlabel="step")
        row[1].set(title="the same by wall-clock", xlabel="training seconds")
        row[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def group_metric(groups, task):
    """success or return: the scale of a task's curves."""
    return next(g for g in groups if g.task == task).modes()[0].partition("_")[0]


# ---- main ----
def main(args):
    runs = read_runs(args.runs)
    groups, unfinished = group_runs(runs), [r for r in runs if not r.result]
    if not groups:
        print(f"error: no finished run below {', '.join(args.runs)}", file=sys.stderr)
        return 2
    out = Path(args.out or Path(args.runs[0]) / "report")
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# Results", ""]
    lines += write_tables(groups, json.loads(Path(args.published).read_text()), args.resamples)
    if unfinished:
        lines += ["", "Not finished, and in no table:", ""]
        lines += [f"- {run.directory}" for run in unfinished]
    text = "\n".join(lines).rstrip() + "\n"
    (out / "report.md").write_text(text)
    if args.pictures:
        for kind, members in groups.items():
            draw_curves(members, out / f"curves_{kind}.png")
    print(text + f"\nwritten to {out}")
    return 0


def main_of(argv=None):
    return main(tyro.cli(Args, description=__doc__, args=argv))


if __name__ == "__main__":
    sys.exit(main_of())

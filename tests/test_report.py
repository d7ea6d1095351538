"""Statistics against hand-computed cases; tables from run directories made up here."""

import html.parser
import itertools
import json
import re
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import ROOT, load_script

report = load_script(ROOT / "benchmark" / "report.py")
PUBLISHED = json.loads((ROOT / "benchmark" / "published.json").read_text())


# ---- statistics ----
def test_interquartile_mean_by_hand():
    assert report.interquartile_mean([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5  # 2 + 3 + 4 + 5 over 4
    assert report.interquartile_mean([9, 0, 1, 2]) == 1.5  # one falls away at each end
    assert report.interquartile_mean([0, 1, 5]) == 2  # fewer than four: the mean
    assert report.interquartile_mean([[7.0]]) == 7
    assert report.interquartile_mean([0, 0, 0, 1, 1]) == pytest.approx(1 / 3)  # floor(5 / 4) = 1


def test_interquartile_mean_of_published_task_means():
    """The plain means of the twelve tasks of FMQ's table."""
    entries = [r for r in PUBLISHED["results"] if r["source"] == "fmq"]
    iqm = {}
    for e in entries:
        means = [v[0] for v in e["values"].values()]
        assert len(means) == 12
        iqm[e["method"]] = round(report.interquartile_mean(means), 3)
    assert list(iqm.values()) == [0.913, 0.923, 0.747, 0.810, 0.847]


def exact_interval(tasks):
    """The bootstrap's 95% interval by listing all resamples, which are equally likely."""
    per_task = [list(itertools.product(t, repeat=len(t))) for t in tasks]
    means = sorted(
        report.interquartile_mean(np.concatenate(c)) for c in itertools.product(*per_task)
    )
    return np.quantile(means, [0.025, 0.975], method="inverted_cdf")


@pytest.mark.parametrize("tasks", [[[0.1, 0.5, 0.9]], [[0.0, 0.3, 0.4], [0.2, 0.7, 1.0]]])
def test_interval_against_all_resamples(tasks):
    interval = report.bootstrap_interval([np.array(t) for t in tasks], 40_000)
    np.testing.assert_allclose(interval, exact_interval(tasks), atol=0.02)


def test_interval_by_hand():
    # two seeds: the mean is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    np.testing.assert_array_equal(report.bootstrap_interval([np.array([0.0, 1.0])], 10_000), [0, 1])
    np.testing.assert_array_equal(report.bootstrap_interval([np.array([0.3])], 100), [0.3, 0.3])


def test_interval_is_stratified():
    """Seeds that agree within each task leave nothing to resample, however tasks differ."""
    tasks = [np.zeros(3), np.ones(3), np.full(3, 0.5)]
    expected = report.interquartile_mean(np.concatenate(tasks))
    np.testing.assert_allclose(report.bootstrap_interval(tasks, 1_000), [expected, expected])


def test_interval_repeats():
    scores = [np.linspace(0, 1, 7)]
    first, second = (report.bootstrap_interval(scores, 500) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first[0] < report.interquartile_mean(scores[0]) < first[1]


def test_profile_by_hand():
    tasks = [np.array([0.0, 1.0]), np.array([0.5, 0.5, 0.5])]
    profile = report.performance_profile(tasks, np.array([0.0, 0.5, 0.75, 1.0]))
    np.testing.assert_allclose(profile, [(0.5 + 1) / 2, 0.5 / 2, 0.5 / 2, 0])
    draws = report.performance_profile(report.resample(tasks, 7), report.LEVELS)
    assert draws.shape == (7, len(report.LEVELS))
    assert (draws[:, 0] >= 0.5).all()  # the second task's seeds agree: they always count


# ---- tables ----
def make_run(root, name, seeds, scores, source="official", label=None, finished=True, **settings):
    """A run directory; `scores` maps metrics to one score (of 4 episodes) per seed."""
    task = settings.pop("task", "cube-double-play-singletask-task3-v0")
    algo, directory = settings.pop("algo", "fmq"), root / name / "run"
    directory.mkdir(parents=True)
    if label:
        (root / name / "launch.json").write_text(json.dumps(dict(label=label)))
    args = dict(env_id=task, seed=seeds[0], num_seeds=len(seeds), out_dir=str(root), **settings)
    facts = dict(algo=algo, task=task, dataset_source=source, device="1 x cpu", commit="abc")
    (directory / "args.json").write_text(json.dumps(facts | dict(args=args)))
    columns = [f"eval/{m}" for m in scores] + ["charts/episodic_return"]
    lines = ["step,phase,seed,time/train_seconds," + ",".join(columns)]
    for step in (100, 200):
        for i, seed in enumerate(seeds):
            values = [str(s[i] * step / 200) for s in scores.values()] + [str(10 * seed + step)]
            lines.append(f"{step},offline,{seed},{step / 10 + seed}," + ",".join(values))
    (directory / "metrics.csv").write_text("\n".join(lines) + "\n")
    if not finished:
        return directory
    episodes = {
        m: [[float(k < round(4 * x)) if m[0] == "s" else x for k in range(4)] for x in v]
        for m, v in scores.items()
    }
    headline = next(iter(scores))
    result = dict(steps=200, train_seconds=20.0, seeds=seeds, episodes=episodes)
    result[f"eval/{headline}_last_three"] = 0.5
    (directory / "result.json").write_text(json.dumps(result))
    return directory


FMQ = dict(actor="flowmap", online_objective="fmq", online_steps=100)


def render(root):
    assert report.main_of([str(root), "--resamples", "200"]) == 0
    return (root / "report" / "report.md").read_text()


def cells(text, *starts):
    """The cells of the one table row that has these cells somewhere, in this order."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    found = [r for r in rows if all(s in r for s in starts)]
    assert len(found) == 1, found
    return found[0]


def test_seeds_of_several_runs_and_modes(tmp_path):
    make_run(
        tmp_path, "a", [0, 1], {"success_best_of_n": [1.0, 0.5], "success_one_step": [0, 0]}, **FMQ
    )
    make_run(tmp_path, "b", [2], {"success_best_of_n": [0.0], "success_one_step": [0.25]}, **FMQ)
    text = render(tmp_path)
    row = cells(text, "success_best_of_n")
    task = "cube-double-play-singletask-task3"
    assert row[:7] == [task, "fmq", "success_best_of_n", "3", "4", "0.50 ± 0.50", row[6]]
    assert row[6].startswith("0.50 [0.00, 1.00]") and row[7] == "0.50" and row[8] == "200"
    assert row[-1] == "FMQ 1.00 ± 0.00 [1]"  # beside ours, in a column of its own
    assert cells(text, "success_one_step")[5] == "0.08 ± 0.14"
    assert cells(text, "success_one_step")[-1] == ""  # nothing is published for it
    assert "[1] Flow maps with optimal Q-guidance" in text and "best-of-32" in text
    for picture in re.findall(r"\]\((curves_\w+\.png)\)", text):
        assert (tmp_path / "report" / picture).stat().st_size > 5_000


def test_official_and_collected_never_share_a_table(tmp_path):
    score = {"success_best_of_n": [1.0]}
    make_run(tmp_path, "a", [0], score, **FMQ)
    make_run(tmp_path, "b", [1], score, source="collected (x.npz)", **FMQ)
    make_run(tmp_path, "c", [2], score, source="generated", **FMQ)
    make_run(tmp_path, "d", [3], score, source="none: online from scratch", **FMQ)
    parts = render(tmp_path).split("\n## ")[1:5]
    titles = [part.splitlines()[0].split(" (")[0] for part in parts]
    assert titles == ["Official datasets", "Collected datasets", "Generated data", "No dataset"]
    for part in parts:
        assert part.count("| fmq | success_best_of_n | 1 |") == 1


def test_newest_run_of_a_seed_counts_and_unfinished_are_listed(tmp_path):
    make_run(tmp_path, "a", [0], {"success": [0.0]}, source="generated", algo="gsflow")
    make_run(tmp_path, "b", [0], {"success": [1.0]}, source="generated", algo="gsflow")
    left = make_run(tmp_path, "c", [1], {"success": [0]}, finished=False, algo="gsflow")
    text = render(tmp_path)
    assert cells(text, "gsflow", "success")[3:6] == ["1", "4", "1.00"]
    assert f"- {left}" in text.split("Not finished")[1]


def test_settings_under_one_label_are_told_apart(tmp_path):
    for name, alpha, label in (("a", 3, "gsflow"), ("b", 10, "gsflow"), ("c", 10, "mine")):
        options = dict(algo="gsflow", label=label, alpha=alpha, gamma=0.99)
        make_run(tmp_path, name, [0], {"success": [0.5]}, source="generated", **options)
    text = render(tmp_path)
    for label in ("gsflow alpha=3", "gsflow alpha=10", "mine"):
        assert cells(text, label, "success")[5] == "0.50"


def test_tasks_without_success_report_returns(tmp_path):
    scores = {"return_stochastic": [-100.0, -200.0], "return_deterministic": [-90.0, -110.0]}
    task = "phys2d/Pendulum-v0"
    make_run(tmp_path, "a", [0, 1], scores, source="none: online", algo="sac_flow", task=task)
    text = render(tmp_path)
    assert cells(text, "return_stochastic")[5] == "-150.00 ± 70.71"
    assert cells(text, "return_deterministic")[5] == "-100.00 ± 14.14"
    assert cells(text, "training_return")[5] == "205.00 ± 7.07"  # 200 and 210, from metrics.csv
    assert "the main results are curves" in text


def test_pooled_tasks(tmp_path):
    for i in (3, 4):
        task = f"cube-double-play-singletask-task{i}-v0"
        score = {"success_best_of_n": [0.25 * i - 0.5] * 4}
        make_run(tmp_path, f"t{i}", [0, 1, 2, 3], score, task=task, **FMQ)
    row = cells(render(tmp_path), "fmq", "success_best_of_n", "8")
    assert row == ["fmq", "success_best_of_n", "2", "8", "0.38", "0.38 [0.38, 0.38]"]


def test_profile_is_of_methods_on_all_tasks(tmp_path):
    tasks = [f"cube-double-play-singletask-task{i}-v0" for i in (1, 2)]
    for name, label, task in (
        ("a", "x", tasks[0]), ("b", "x", tasks[1]), ("c", "y", tasks[0]), ("d", "z", tasks[0]),
    ):  # fmt: skip
        make_run(tmp_path, name, [0, 1], {"success_n1": [0.5, 1.0]}, label=label, task=task)
    assert "profile_" not in render(tmp_path)  # x alone is on both
    make_run(tmp_path, "e", [0], {"success_n1": [0.25]}, label="y", task=tasks[1])
    assert "(profile_official.png)" in render(tmp_path)
    assert (tmp_path / "report" / "profile_official.png").stat().st_size > 5_000
    groups = report.group_runs(report.read_runs([tmp_path]))["official"]
    scores = report.profile_scores(groups)
    assert list(scores) == ["x n1", "y n1"]  # z is on one
    assert [list(s) for s in scores["y n1"]] == [[0.5, 1.0], [0.25]]


def test_published_number_stands_only_where_it_belongs(tmp_path):
    score = {"success_best_of_n": [1.0]}
    make_run(tmp_path, "a", [0], score, **FMQ | dict(online_steps=0))
    run = make_run(tmp_path, "b", [0], score, **FMQ | dict(online_objective="mvp"))
    for env_id in ("cube-double-play-singletask-task3-v0", "cube-double-task3"):  # full, and short
        facts = json.loads((run / "args.json").read_text())
        facts["args"]["env_id"] = env_id
        (run / "args.json").write_text(json.dumps(facts))
        text = render(tmp_path)
        assert "FMQ 1.00" not in text.split("## Averages")[0]
        assert "MVP, their re-run 1.00 ± 0.00" in text


def test_no_run_is_one_sentence(tmp_path, capsys):
    assert report.main_of([str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_curves_by_step_and_seconds(tmp_path):
    make_run(tmp_path, "a", [0, 1], {"success": [1.0, 0.5]}, algo="gsflow", source="generated")
    (group,) = report.group_runs(report.read_runs([tmp_path]))["generated"]
    steps, seconds, values = report.read_curves(group, "eval/success")
    assert steps.tolist() == [100, 200] and seconds.tolist() == [10.5, 20.5]
    np.testing.assert_allclose(values, [[0.5, 0.25], [1.0, 0.5]])


def test_headline_leaves_the_first_mode_of_each_method(tmp_path):
    scores = {"success_best_of_n": [0.5], "success_one_step": [0.25]}
    make_run(tmp_path, "a", [0], scores, source="generated")
    groups = report.group_runs(report.read_runs([tmp_path]))
    for headline, count in ((False, 2), (True, 1)):
        args = report.Args(headline=headline, resamples=50)
        (section,) = report.make_sections(groups, dict(results=[]), args)[0]
        assert len(section.curves) == count and "best_of_n" in section.curves[0].name
        assert len(section.rows) == 2


def test_curve_of_a_run_from_the_end_of_another(tmp_path):
    """Its offline evaluations are those of the run that it started from, up to there."""
    base = make_run(tmp_path, "base", [0], {"success_best_of_n": [0.5]}, offline_steps=100)
    with open(base / "metrics.csv", "a") as file:  # of an online phase that the base had as well
        file.write("300,online,0,40,0.9,1\n")
    settings = FMQ | dict(offline_steps=200, start_from=str(base))
    run = make_run(tmp_path, "run", [0], {"success_best_of_n": [1.0]}, label="mvp", **settings)
    (run / "metrics.csv").write_text(
        "step,phase,seed,time/train_seconds,eval/success_best_of_n\n250,online,0,30,1.0\n"
    )
    for there, steps in ((True, [100, 200, 250]), (False, [250])):
        if not there:
            (base / "metrics.csv").unlink()
        groups = report.group_runs([r for r in report.read_runs([tmp_path]) if r.label == "mvp"])
        found = report.read_curves(groups["official"][0], "eval/success_best_of_n")
        assert found[0].tolist() == steps


# ---- steps to a target ----
def make_curve(root, label, seed, values, **settings):
    """A run of one seed that is evaluated at steps 10, 20, ..., each after as many seconds / 2."""
    options = dict(algo="gsflow", label=label, **settings)
    directory = make_run(root, f"{label}{seed}", [seed], {"success": values[-1:]}, **options)
    lines = ["step,phase,seed,time/train_seconds,eval/success"]
    for i, value in enumerate(values, 1):
        lines += [f"{10 * i - 5},offline,{seed},{5 * i - 2},", f"{10 * i},x,{seed},{5 * i},{value}"]
    (directory / "metrics.csv").write_text("\n".join(lines) + "\n")


def reach_cells(root, *words):
    """{method: cells after it} of the table of steps to a target."""
    assert report.main_of([str(root), "--resamples", "50", "--steps-to", *words]) == 0
    text = (root / "report" / "report.md").read_text().split("Steps to ")[1]
    rows = [[c.strip() for c in x.split("|")[2:-1]] for x in text.splitlines() if "cube" in x]
    return {row[0]: row[1:] for row in rows}


def test_steps_to_a_target_by_hand(tmp_path):
    for seed, values in enumerate([[0.2, 0.5, 0.1], [0.6, 0.0, 0.0], [0.4, 0.4, 0.9]]):
        make_curve(tmp_path, "fast", seed, values)  # 20, 10, 30: median 20, 10 seconds
    for seed, values in enumerate([[0, 0, 0, 0.5], [0, 0, 0, 0], [0, 0, 0.5, 0]]):
        make_curve(tmp_path, "slow", seed, values)  # 40, never, 30: median 40, 20 seconds
    for seed, values in enumerate([[0, 0.7, 0], [0, 0, 0], [0.4999, 0, 0]]):
        make_curve(tmp_path, "never", seed, values)  # 20, never in 30, twice: above 30, 15 seconds
    found = reach_cells(tmp_path, "0.5")
    each = "0: 20 (10 s); 1: 10 (5 s); 2: 30 (15 s)"
    assert found["fast"] == ["success", "3 of 3", "20 (1.00 x)", "", "10 (1.00 x)", each]
    each = "0: 40 (20 s); 1: not reached by 40 (20 s); 2: 30 (15 s)"
    assert found["slow"] == ["success", "2 of 3", "40 (2.00 x)", "", "20 (2.00 x)", each]
    each = "0: 20 (10 s); 1: not reached by 30 (15 s); 2: not reached by 30 (15 s)"
    assert found["never"] == ["success", "1 of 3", "> 30 (> 1.50 x)", "", "> 15 (> 1.50 x)", each]
    # where nobody reaches it, there is nothing to compare with
    assert reach_cells(tmp_path, "0.95")["fast"][1:5] == ["0 of 3", "> 30", "", "> 15"]


def test_steps_to_a_target_counts_online_steps(tmp_path):
    make_curve(tmp_path, "a", 0, [0, 0, 0.5], offline_steps=20, online_steps=20)  # 10 online
    make_curve(tmp_path, "b", 0, [0, 0, 0, 0.5], offline_steps=20, online_steps=20)  # 20 online
    make_curve(tmp_path, "c", 0, [0, 0, 0, 0, 0.5], offline_steps=50, online_steps=0)
    found = reach_cells(tmp_path, "0.5")
    assert [found[x][2] for x in "abc"] == ["30 (1.00 x)", "40 (1.33 x)", "50 (1.67 x)"]
    assert [found[x][3] for x in "abc"] == ["10 (1.00 x)", "20 (2.00 x)", ""]


def test_a_seed_that_never_did_is_later_than_all_others():
    reaches = [report.Reach(r, s, None, s) for r, s in ((True, 10), (True, 20), (False, 5))]
    assert report.median_reach(reaches, "steps") == (20, True)  # not 10, though its run was short
    assert report.median_reach(reaches[1:], "steps") == (12.5, False)
    assert report.median_reach(reaches, "online") is None


def test_steps_to_a_target_of_a_repeated_seed_is_the_newest_runs(tmp_path):
    make_run(tmp_path, "a", [0], {"success": [1.0]}, algo="gsflow")
    make_run(tmp_path, "b", [0], {"success": [0.25]}, algo="gsflow")
    assert reach_cells(tmp_path, "0.5")["gsflow"][1] == "0 of 1"


# ---- the page ----
class Page(html.parser.HTMLParser):
    """What a page consists of: tags with their attributes, tables as lists of rows, text."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.text, self.open, self.ids = [], [], "", [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open.pop() != tag:  # cells and rows need no end
            assert self.open

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "title") and "svg" not in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open[-3:]):
            self.tables[-1][-1][-1] += data

    def of(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def page_of(root, *words):
    assert report.main_of([str(root), "--resamples", "50", "--no-pictures", *words]) == 0
    return Page((root / "report" / "report.html").read_text())


def test_page_needs_nothing_but_itself(tmp_path):
    directory = make_run(tmp_path, "a", [0], {"success": [0.5]}, algo="gsflow", label="<b> & co")
    (directory / "episode.gif").write_bytes(b"GIF89a")
    (directory.parent / "log.txt").write_text("log")
    make_run(tmp_path, "un#finished", [1], {"success": [0]}, finished=False, algo="gsflow")
    page = page_of(tmp_path)
    assert any("width=device-width" in meta.get("content", "") for meta in page.of("meta"))
    assert not page.of("script", "link", "iframe")
    sources = [a["src"] for _, a in page.tags if "src" in a]
    assert sources == ["data:image/gif;base64,R0lGODlh"]
    links = [a["href"] for a in page.of("a")]
    assert "../a/log.txt" in links and "../un%23finished/run/args.json" in links
    for target in links:
        assert (tmp_path / "report" / unquote(target)).is_file()
    assert page.tables[0][1][0] == "<b> & co success"  # escaped
    assert not page.of("b")
    assert "1 finished runs, 1 not finished" in page.text
    assert [row[2] for row in page.tables[-1][1:]] == ["finished", "not finished"]


def test_page_has_the_scores_of_the_markdown(tmp_path):
    for task in ("cube-double-play-singletask-task3-v0", "cube-double-play-singletask-task4-v0"):
        scores = {"success_best_of_n": [1.0, 0.5, 0.0], "success_one_step": [0.25, 0, 0]}
        make_run(tmp_path, task, [0, 1, 2], scores, task=task, **FMQ)
    page = page_of(tmp_path, "--steps-to", "0.5")
    assert page.tables[0][0][:4] == ["method", "mean ± deviation", "IQM [95%]", "seeds"]
    assert page.tables[0][1][:2] == ["fmq success_best_of_n", "0.50 ± 0.50"]
    assert page.tables[0][2][:2] == ["fmq success_one_step", "0.08 ± 0.14"]
    assert "FMQ 1.00 ± 0.00 [1]" in page.tables[0][1]
    assert page.tables[1][1][1] == "2 of 3"  # 1.0 and 0.5 at the last step
    assert [t[1][1] for t in page.tables if t[0][1] == "mean over tasks"] == ["0.50"]
    assert "[1] Flow maps with optimal Q-guidance" in page.text


def test_page_draws_the_curves(tmp_path):
    """Both charts of a task by hand: the plot is 348 x 196, its lower left corner at (42, 206)."""
    scores = {"success_n1": [1.0, 0.5], "success_n4": [0.0, 0.0]}
    make_run(tmp_path, "a", [0, 1], scores, algo="flowq", source="generated")
    make_run(tmp_path, "b", [2], {"success_n1": [0.0]}, algo="flowq", label="z", source="generated")
    page = page_of(tmp_path)
    assert len(page.of("svg")) == 2
    lines = [a["points"] for a in page.of("polyline")]
    assert len(lines) == 6
    # steps 100 and 200 of 200, means 0.375 and 0.75; seconds 10.5 and 20.5 of the longest 22
    assert lines[0] == "216.0,132.5 390.0,59.0"
    assert lines[3] == f"{42 + 348 * 10.5 / 22:.1f},132.5 {42 + 348 * 20.5 / 22:.1f},59.0"
    # the band is that of the IQM: with two seeds from the one score to the other
    assert page.of("polygon")[0]["points"] == "216.0,108.0 390.0,10.0 390.0,108.0 216.0,157.0"
    assert [a.get("class") for a in page.of("g")] == [None, "other", None] * 2
    assert page.of("polyline")[0]["class"] == "curve" and page.of("input")
    colors = [a["stroke"] for a in page.of("g")][:3]
    assert colors[0] == colors[1] != colors[2]  # a colour is a method
    assert "flowq n1 (2): 0.75 [0.50, 1.00], step 200, 20 s" in page.text


def test_page_curves_of_returns_have_their_own_scale(tmp_path):
    make_run(tmp_path, "a", [0], {"return_n1": [-1000.0]}, algo="flowq", source="generated")
    page = page_of(tmp_path)
    # from -1000 to the 200 of the last training episodes, and 60 more at either end
    low, high = -1060, 260
    ys = [round(10 + 196 * (high - y) / (high - low), 1) for y in (-500, -1000)]
    assert page.of("polyline")[0]["points"] == f"216.0,{ys[0]} 390.0,{ys[1]}"


def test_page_names_the_settings_that_differ(tmp_path):
    shared = dict(source="generated", hidden_dims=[8, 8])
    make_run(tmp_path, "a", [0], {"success": [1]}, algo="gsflow", alpha=1, gamma=0.9, **shared)
    make_run(tmp_path, "b", [0], {"success": [1]}, algo="fmq", alpha=2, **shared)
    rows = [["setting", "fmq", "gsflow"], ["alpha", "2", "1"]]  # gamma belongs to one of them
    assert rows in page_of(tmp_path).tables


def test_page_shows_small_videos_and_links_large_ones(tmp_path, monkeypatch):
    directory = make_run(tmp_path, "a", [0], {"success": [1]}, algo="gsflow")
    (directory / "videos").mkdir()
    files = {"x.mp4": 900, "x.gif": 1000, "y.gif": 500, "z.webm": 3000, "plot.png": 700}
    for name, size in files.items():
        (directory / "videos" / name).write_bytes(b"0" * size)
    monkeypatch.setattr(report, "LARGE", 2000)

    def shown(*words):
        page = page_of(tmp_path, *words)
        kinds = [a["src"].split(";")[0] for a in page.of("img", "video")]
        return sorted(kinds), [a["href"] for a in page.of("a") if "videos" in a["href"]]

    both = ["data:image/gif", "data:image/png", "data:video/mp4"]
    # of x the smaller format; z is too large; 0.0013 MB are enough for y and the plot
    assert shown() == (both, ["../a/run/videos/z.webm"])
    left = ["../a/run/videos/x.mp4", "../a/run/videos/z.webm"]
    assert shown("--embed-mb", "0.0013") == (both[:2], left)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 20000, [0, 5000, 10000, 15000, 20000]),
        (-3.2, 1.1, [-3, -2, -1, 0, 1]),
        (5, 5, [5]),
    ],
)
def test_ticks(low, high, expected):
    assert report.ticks(low, high) == expected


def test_short_numbers():
    assert [report.short(x) for x in (0.2, 500, 2500, -3e6)] == ["0.2", "500", "2.5k", "-3M"]


# ---- the data file ----
def test_every_published_number_has_its_source():
    for entry in PUBLISHED["results"] + PUBLISHED["averages"]:
        source = PUBLISHED["sources"][entry["source"]]
        assert all(source[k] for k in ("title", "protocol", "caveat"))
    for entry in PUBLISHED["results"]:
        for value in entry["values"].values():
            assert all(0 <= v <= 1 for v in np.ravel(value))


@pytest.mark.parametrize("stem", sorted({entry["script"] for entry in PUBLISHED["results"]}))
def test_published_entries_fit_the_scripts(stem):
    script = load_script(ROOT / "algos" / f"{stem}.py")
    fields = script.Args.__dataclass_fields__
    for entry in (e for e in PUBLISHED["results"] if e["script"] == stem):
        assert set(entry["where"]) <= set(fields)
        for task in entry["values"]:
            assert script.parse_task(task).name == task

"""The pages in a real browser: sorting, filtering, following a number to its documents."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Open = Callable[..., Any]


def arms(page: Any) -> list[str]:
    """Names of the arms that are visible, from top to bottom."""
    names = page.locator("table.board tbody tr:visible th a").all_inner_texts()
    return [name.rsplit("=", 1)[-1] if "=" in name else name for name in names]


def header(page: Any, text: str) -> Any:
    return page.locator("table.board thead th", has_text=text).first


def test_a_click_on_a_header_sorts_and_a_second_one_turns_the_order(
    site: Path, watch: Open
) -> None:
    page = watch(site / "index.html")
    assert arms(page) == ["high", "low", "other <b>"]  # by rank
    retention = header(page, "Retention, average")
    retention.get_by_role("button").click()
    assert retention.get_attribute("aria-sort") == "descending"
    assert arms(page) == ["other <b>", "low", "high"]
    retention.get_by_role("button").click()
    assert retention.get_attribute("aria-sort") == "ascending"
    assert arms(page) == ["high", "low", "other <b>"]
    keys = page.locator("table.board tbody tr td:nth-child(6)").evaluate_all(
        "cells => cells.map(cell => Number(cell.dataset.key))"
    )
    assert keys == sorted(keys)


def test_a_header_is_reached_and_pressed_by_keyboard(site: Path, watch: Open) -> None:
    page = watch(site / "index.html")
    arm = header(page, "Arm")
    arm.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert arm.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Space")
    assert arm.get_attribute("aria-sort") == "descending"
    assert arms(page) == ["other <b>", "low", "high"]


def test_every_column_sorts(site: Path, watch: Open) -> None:
    page = watch(site / "index.html")
    headers = page.locator("table.board thead th")
    for number in range(headers.count()):
        headers.nth(number).get_by_role("button").click()
        assert headers.nth(number).get_attribute("aria-sort") in ("ascending", "descending")
        assert len(arms(page)) == 3


def test_arms_are_filtered_by_text_experiment_and_verdict(site: Path, watch: Open) -> None:
    page = watch(site / "index.html")
    page.get_by_placeholder("Filter the arms").fill("beta=LOW")
    assert arms(page) == ["low"]
    assert page.locator(".filters output").inner_text() == "1 of 3 arms"
    page.get_by_placeholder("Filter the arms").fill("")
    page.get_by_label("Experiment").select_option("other <b>")
    assert arms(page) == ["other <b>"]
    page.get_by_label("Experiment").select_option("")
    page.get_by_label("Verdict").select_option("forgot")
    assert arms(page) == ["high", "low"]
    page.get_by_label("Verdict").select_option("kept")
    assert arms(page) == ["other <b>"]


def test_without_scripts_it_is_a_plain_table_with_links(site: Path, watch: Open) -> None:
    page = watch(site / "index.html", java_script_enabled=False)
    assert page.locator("table.board tbody tr").count() == 3
    assert not page.locator(".filters").is_visible()
    assert page.locator("thead button").count() == 0
    page.locator("table.board tbody tr").first.locator("td a.number").first.click()
    assert page.locator("article.sample:visible").count() > 0


def test_a_number_leads_to_its_documents_which_are_filtered(site: Path, watch: Open) -> None:
    page = watch(site / "index.html")
    page.locator("table.board tbody tr", has_text="low").locator("td a.number").first.click()
    assert page.url.endswith("samples/demo-low/task-json-base-dpo.html")
    samples = page.locator("article.sample:visible")
    assert samples.count() == 120
    page.locator(".filters button", has_text="lost").click()
    lost = page.locator("article.sample[data-outcome=lost]").count()
    assert 0 < samples.count() == lost < 120
    assert page.locator(".filters output").inner_text() == f"{lost} shown"
    for values in samples.locator(".values b").all_inner_texts():
        assert values == "1 → 0"
    page.locator(".filters button", has_text="all").click()
    page.get_by_placeholder("Search the texts").fill("answer of dpo to 7 IS")
    assert samples.count() == 1
    assert "Question 7?" in samples.first.text_content()


def test_a_link_may_ask_for_an_outcome(site: Path, watch: Open) -> None:
    page = watch(site / "samples/demo-high/general-arc-base-dpo.html")
    page.goto(f"{page.url}#lost")
    page.reload()
    assert page.locator("button[aria-pressed=true]").inner_text().startswith("lost")


def test_multiple_choice_shows_its_options_with_both_likelihoods(site: Path, watch: Open) -> None:
    page = watch(site / "samples/demo-high/general-arc-base-dpo.html")
    page.locator(".filters button", has_text="lost").click()
    rows = page.locator("article.sample:visible").first.locator("tbody tr")
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    assert [[text.strip() for text in row[1:]] for row in cells] == [
        ["● −3.50", "−9.25"],
        ["−9.25", "● −3.50"],
    ]
    assert cells[0][0].startswith("✓")
    assert "of two lines" in cells[1][0]


def test_the_arm_page_shows_curves_forgetting_and_formats(site: Path, watch: Open) -> None:
    page = watch(site / "arms/demo-low.html")
    labels = page.locator("svg[role=img]").evaluate_all("all => all.map(one => one.ariaLabel)")
    for start in (
        "loss over steps: training 0",
        "reward margin over steps",
        "score (%)",
        "change of accuracy",
    ):
        assert any(label.startswith(start) for label in labels), start
    assert "held-out 1" in next(label for label in labels if label.startswith("loss over"))
    assert page.get_by_text("2 logged rows hold a number that is not finite").count() == 1
    table = page.locator("table.forms")
    assert table.locator("tbody tr").count() == 4
    size = table.locator("thead th", has_text="Size")
    size.get_by_role("button").click()
    assert table.locator("tbody th").all_inner_texts() == [
        "nf4",
        "int8",
        "gguf_q8_0",
        "unquantized",
    ]


def test_the_arms_stay_in_sight_when_a_wide_table_is_scrolled(site: Path, watch: Open) -> None:
    page = watch(site / "index.html", viewport={"width": 390, "height": 800})
    table = page.locator(".scroll", has=page.locator("table.board"))
    table.evaluate("element => element.scrollTo(400, 0)")
    name = page.locator("table.board tbody th").first.bounding_box()
    assert 0 <= name["x"] - table.bounding_box()["x"] < 2
    assert page.locator("table.board tbody th a").first.inner_text() == "demo · dpo.args.beta=high"


def test_a_page_of_held_out_text_speaks_of_its_loss(site: Path, watch: Open) -> None:
    page = watch(site / "samples/demo-low/text-wiki-base-dpo.html")
    page.locator(".filters button", has_text="higher loss").click()
    assert page.locator("article.sample:visible").count() == 40
    assert page.locator("article.sample h4").first.inner_text() == "Text"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_window_in_either_scheme(
    site: Path, watch: Open, scheme: str, width: int
) -> None:
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    for name in (
        "index.html",
        "arms/demo-low.html",
        "arms/other-b--hostile.html",
        "samples/demo-low/task-json-base-dpo.html",
        "samples/demo-low/general-arc-base-dpo.html",
        "samples/demo-low/text-wiki-base-dpo.html",
    ):
        page = watch(site / name, **options)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
        assert page.title() != "owned"


def test_every_link_leads_to_a_page_or_a_place_on_it(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        for target in re.findall(r'\bhref="([^"]*)"', text):
            file, _, anchor = target.partition("#")
            if file.startswith("data:"):
                continue
            found = (path.parent / file).resolve() if file else path
            assert found.is_file(), f"{path}: {target}"
            if anchor and found.suffix == ".html":
                assert f'id="{anchor}"' in found.read_text("utf-8"), f"{path}: {target}"

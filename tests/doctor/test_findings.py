from __future__ import annotations

from dwt_ds.doctor.findings import Finding, render

FINDINGS = [
    Finding("ssh", "node-1", True, "answers"),
    Finding("ssh", "node-2", False, "no route to host", "start sshd there"),
    Finding("disk", "node-1", True, "62 GiB free"),
    Finding("disk", "node-2", True, "62 GiB free"),
    Finding("collective", "", True, "2 ranks"),
]


def test_every_line_has_the_word_and_a_failed_one_its_fix() -> None:
    lines = render(FINDINGS, colour=False).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["PASS", "ssh", "node-1", "answers"],
        ["FAIL", "ssh", "node-2", "no", "route", "to", "host", "->", "start", "sshd", "there"],
    ]
    assert lines[-1] == "1 of 5 checks failed"
    assert "\033" not in "".join(lines)


def test_hosts_that_found_the_same_share_a_line() -> None:
    assert "node-1, node-2  62 GiB free" in render(FINDINGS, colour=False)
    many = [Finding("disk", f"node-{i}", True, "62 GiB free") for i in range(64)]
    assert "node-0 and 63 others  62 GiB free" in render(many, colour=False)


def test_colour_comes_on_top_of_the_words() -> None:
    text = render(FINDINGS, colour=True)
    assert "\033[32mPASS\033[0m" in text
    assert "\033[31mFAIL\033[0m" in text


def test_all_well_is_said() -> None:
    assert render(FINDINGS[:1], colour=False).splitlines()[-1] == "everything is in order"

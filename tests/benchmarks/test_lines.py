from benchmarks.lines import append_line, read_lines


def test_lines_are_read_as_they_were_added(tmp_path):
    file = tmp_path / "folder" / "figures.jsonl"
    assert read_lines(file) == []
    for users in (1, 2):
        append_line(file, {"users": users})
    assert read_lines(file) == [{"users": 1}, {"users": 2}]


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    file = tmp_path / "figures.jsonl"
    append_line(file, {"users": 1})
    with file.open("a") as stream:
        stream.write('{"users": 2, "co')  # killed while it wrote
    assert read_lines(file) == [{"users": 1}]
    append_line(file, {"users": 2})
    assert read_lines(file) == [{"users": 1}, {"users": 2}]

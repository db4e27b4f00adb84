"""What fails on which release of torch, and why: expected there, and an error where it passes after all."""

from __future__ import annotations

LOOPS = "on the CPU torch 2.11 may allocate behind a loop that writes there, so that rows of loops stay outside the arena"
WORDS = "Dynamo of torch 2.11 breaks here in other words"
TORCH = "torch 2.11's own: "

_VMAP = TORCH + "no fake linear under vmap"
_COND = TORCH + "its error hides ours"
_ARENA = "tests/attnres_fx/test_arena"
_BREAK = "tests/attnres_fx/test_graph_breaks.py::test_a_break_names_the_line_the_reason_and_the_way_out"
_WRAPPED = "tests/attnres_fx/test_wrapped.py::"
_ROWS = "tests/passes/memory/test_rows.py::"

# By the beginning of the version: test, reason.
KNOWN: dict[str, dict[str, str]] = {
    "2.11.": {
        **dict.fromkeys((
            f"{_ARENA}.py::test_no_row_is_allocated_or_copied[one-pass]",
            f"{_ARENA}.py::test_no_row_is_allocated_or_copied[two-phase]",
            f"{_ARENA}.py::test_the_arena_is_the_plan[3]",
            f"{_ARENA}.py::test_the_arena_is_the_plan[9]",
            f"{_ARENA}.py::test_a_row_is_read_where_it_was_written",
            f"{_ARENA}.py::test_a_row_moves_with_its_offset",
            f"{_ARENA}_calls.py::test_what_is_returned_lies_elsewhere",
            f"{_ARENA}_training.py::test_the_blocks_of_a_training_step_lie_together[one-pass]",
            f"{_ARENA}_training.py::test_the_blocks_of_a_training_step_lie_together[two-phase]",
            f"{_ARENA}_training.py::test_blocks_are_freed_with_what_autograd_keeps",
            f"{_ROWS}test_rows_end_with_the_last_reader_of_a_view",
            f"{_ROWS}test_a_sum_goes_on_over_no_part_that_its_other_operand_is_made_of",
            f"{_ROWS}test_a_row_is_in_use_until_what_is_made_of_it_is_computed",
            f"{_ROWS}test_what_the_graph_returns_is_nobodys_to_place[<lambda>0]",
            f"{_ROWS}test_what_the_graph_returns_is_nobodys_to_place[<lambda>1]",
            f"{_ROWS}test_the_backward_keeps_blocks_and_not_partial_sums"), LOOPS),
        **dict.fromkeys((
            f"{_BREAK}[converted-looked_up--]", f"{_BREAK}[eager-looked_up--]", f"{_BREAK}[compiled-looked_up--]",
            f"{_BREAK}[one line-looked_up--]", "tests/attnres_fx/test_graph_breaks.py::test_what_the_model_raises_is_told"),
            WORDS),
        "tests/runtime/test_triton.py::test_a_binary_of_the_other_targets[hip:gfx942]": "Triton 3.6 spills 7 registers",
        "tests/attnres_fx/test_graph_modules.py::test_keyword_inputs_and_wrong_inputs":
            TORCH + "a fake embedding takes indices of any dtype",
        "tests/attnres_fx/test_transforms.py::test_what_cannot_be_rewritten_is_refused[jvp]":
            TORCH + "an internal assertion comes before our refusal",
        "tests/attnres_fx/test_vision_language.py::test_streams_of_two_towers[1_0]":
            TORCH + "Dynamo cannot trace where images go into the text",
        "tests/attnres_fx/test_reference.py::test_compiled_equals_the_reference[3-2-inductor]":
            TORCH + "attention in float64 fails under Inductor on the CPU",
        f"{_WRAPPED}test_hidden_layers_are_refused_by_name[conditional_layers-HiddenLayersError-cond]": _COND,
        f"{_WRAPPED}test_hidden_layers_are_refused_by_name[one_conditional_layer-HiddenLayersError-cond]": _COND,
        f"{_WRAPPED}test_hidden_layers_are_refused_by_name[vectorised_layers-StreamRefusedError-vmap|getitem|batch_dim]":
            _VMAP,
        f"{_WRAPPED}test_operators_within_a_branch_are_a_branch[vectorised_branches]": _VMAP,
    },
}

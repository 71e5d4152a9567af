"""Errors for people: what a missing package of an extra says, and lists of names."""

import pytest

from medusa_jax.errors import InputError, listed, needs


def test_a_missing_package_names_the_extra_that_installs_it():
    message = r"^no_such_package is not installed: pip install 'medusa_jax\[train\]'$"
    with pytest.raises(InputError, match=message), needs("train"):
        import no_such_package.inner  # noqa: F401  # pyrefly: ignore


def test_a_missing_module_of_this_project_is_a_bug():
    with pytest.raises(ModuleNotFoundError), needs("train"):
        import medusa_jax.no_such_module  # noqa: F401  # pyrefly: ignore


def test_lists_of_names_are_short():
    assert listed([]) == ""
    assert listed(["a", 2]) == "a, 2"
    assert listed(range(1000), 2) == "0, 1 and 998 more"
    assert len(listed(["x" * 10**6])) == 200

"""Errors for people: what a missing package of an extra says."""

import pytest

from medusa_jax.errors import InputError, needs


def test_a_missing_package_names_the_extra_that_installs_it():
    message = r"^no_such_package is not installed: pip install 'medusa_jax\[train\]'$"
    with pytest.raises(InputError, match=message), needs("train"):
        import no_such_package.inner  # noqa: F401  # pyrefly: ignore


def test_a_missing_module_of_this_project_is_a_bug():
    with pytest.raises(ModuleNotFoundError), needs("train"):
        import medusa_jax.no_such_module  # noqa: F401  # pyrefly: ignore

"""Changes modules once they are imported, in processes that a test starts: for `sitecustomize.py` in a folder here."""

import importlib.machinery
import sys


class AfterImport:
    """Finds modules as the other finders do, and changes those of which `changes` has a function, once loaded."""

    def __init__(self, changes):
        self._changes = changes
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path=None, target=None):
        if name not in self._changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            self._changes[name](module)

        spec.loader.exec_module = exec_module
        return spec

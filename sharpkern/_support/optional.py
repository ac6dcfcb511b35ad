"""Optional packages: what to install when one is missing."""


def missing(package: str, extra: str, purpose: str) -> ImportError:
    """Return the error that names the extra."""
    return ImportError(f"{purpose} needs {package}, which is not installed; run: pip install 'sharpkern[{extra}]'")

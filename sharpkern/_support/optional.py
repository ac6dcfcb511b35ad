"""Optional packages: what to install when one is missing."""


def missing(package: str, extra: str, purpose: str) -> ImportError:
    """Return the error that names the extra.

    Args:
        package: What could not be imported.
        extra: The extra of sharpkern that brings it.
        purpose: What it is needed for.

    Returns:
        The error to raise.
    """
    return ImportError(f"{purpose} needs {package}, which is not installed; run: pip install 'sharpkern[{extra}]'")

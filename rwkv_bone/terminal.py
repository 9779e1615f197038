"""Numbers as people read them."""


def counted(n: int, noun: str, plural: str = "s") -> str:
    """1 epoch, 2 epochs, 1,000 epochs."""
    return f"{n:,} {noun}" + ("" if n == 1 else plural)


def in_bytes(size: float) -> str:
    """1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def clock(seconds: float) -> str:
    """1:05, or 2:00:00 from an hour on."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

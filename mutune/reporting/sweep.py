from pathlib import Path
def draw_study(directory: Path) -> list[Path]:
    return []

"""Records → frames → plots → page: every number is made in `frames`, every picture drawn in `plots`, every PNG by
`figures`, and `page` puts pictures and numbers into one HTML file.

    runs = load_runs(Path("runs/sweeps/valley"))
    points = valleys(runs)
    plot_valleys(points[points.table == "mup"], optima(points), axes)

This is the only room that imports matplotlib. It reads the folders of the runs, never the storage of the search.
"""

from mutune.reporting.figures import draw_certificate, draw_study, draw_train, draw_transfer
from mutune.reporting.frames import (
    band,
    best_per_width,
    best_trials,
    certified,
    context_switches,
    curves,
    drift,
    history,
    load_records,
    load_runs,
    load_space,
    loss_window,
    mean_valleys,
    offsets,
    optima,
    outside,
    valleys,
)
from mutune.reporting.notebook import benchmarks_folder, results, runs_folder
from mutune.reporting.plots import (
    plot_band,
    plot_context_switches,
    plot_drift,
    plot_history,
    plot_learning_rate,
    plot_loss_curves,
    plot_optima,
    plot_slice,
    plot_target,
    plot_valleys,
)
from mutune.reporting.positions import (
    load_positions,
    plot_loss_by_position,
    plot_position_differences,
    position_differences,
    position_means,
)

__all__ = [
    "band",
    "benchmarks_folder",
    "best_per_width",
    "best_trials",
    "certified",
    "context_switches",
    "curves",
    "draw_certificate",
    "draw_study",
    "draw_train",
    "draw_transfer",
    "drift",
    "history",
    "load_positions",
    "load_records",
    "load_runs",
    "load_space",
    "loss_window",
    "mean_valleys",
    "offsets",
    "optima",
    "outside",
    "plot_band",
    "plot_context_switches",
    "plot_drift",
    "plot_history",
    "plot_learning_rate",
    "plot_loss_by_position",
    "plot_loss_curves",
    "plot_optima",
    "plot_position_differences",
    "plot_slice",
    "plot_target",
    "plot_valleys",
    "position_differences",
    "position_means",
    "results",
    "runs_folder",
    "valleys",
]

"""The Grafana dashboards, as code: run as a program, it writes their JSON beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos

HERE = Path(__file__).parent
SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
WINDOW = "[$__rate_interval]"
WIDTH, HEIGHT, ACROSS = 8, 7, 3


@dataclass(frozen=True)
class Panel:
    """A picture of some queries: `{legend: expression}`; a legend may name labels in braces."""

    title: str
    unit: str
    queries: Mapping[str, str]


def rate(metric: str, by: str = "") -> str:
    """Per second, over all replicas."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{WINDOW}))"


def quantiles(metric: str) -> dict[str, str]:
    """Median and 99th percentile of a histogram."""
    buckets = f"sum by (le) (rate({metric}_bucket{WINDOW}))"
    return {f"p{q * 100:g}": f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.99)}


def mean(metric: str) -> str:
    return f"{rate(f'{metric}_sum')} / {rate(f'{metric}_count')}"


SERVING = [
    Panel("Choices that ended", "reqps", {
        "{{finished_reason}}": rate("polyhead_request_success_total", "finished_reason")}),
    Panel("Refused", "reqps", {"{{code}}": rate("polyhead_request_refusals_total", "code")}),
    Panel("Sequences", "short", {
        "running": "sum(polyhead_num_requests_running)",
        "waiting": "sum(polyhead_num_requests_waiting)"}),
    Panel("To the first token", "s", quantiles("polyhead_time_to_first_token_seconds")),
    Panel("Between tokens", "s", quantiles("polyhead_inter_token_latency_seconds")),
    Panel("Whole requests", "s", quantiles("polyhead_e2e_request_latency_seconds")),
    Panel("In line", "s", quantiles("polyhead_request_queue_time_seconds")),
    Panel("Prompts", "s", quantiles("polyhead_request_prefill_time_seconds")),
    Panel("Tokens", "short", {
        "prompts": rate("polyhead_prompt_tokens_total"),
        "answers": rate("polyhead_generation_tokens_total")}),
    Panel("Prompt tokens found computed", "percentunit", {
        "found": f"{rate('polyhead_prefix_cache_hits_total')} / "
        f"{rate('polyhead_prefix_cache_queries_total')}"}),
    Panel("Steps", "s", quantiles("polyhead_step_seconds")),
    Panel("Time of steps by phase", "percentunit", {
        "{{phase}}": rate("polyhead_step_phase_seconds_total", "phase")}),
]  # fmt: skip
TASKS = [
    Panel("Busiest tasks, requests", "reqps", {
        "{{task}}": "topk(10, " + rate("polyhead_task_requests_total", "task") + ")"}),
    Panel("Busiest tasks, tokens", "short", {
        "{{task}}": "topk(10, " + rate("polyhead_task_generation_tokens_total", "task") + ")"}),
    Panel("Distinct tasks in a step", "short", {
        "mean": mean("polyhead_step_tasks"), **quantiles("polyhead_step_tasks")}),
    Panel("Tasks of steps by form", "short", {
        "{{form}}": rate("polyhead_adapter_form_tasks_total", "form")}),
    Panel("Tasks", "short", {
        "registered": "max(polyhead_tasks_registered)",
        "resident": "sum(polyhead_tasks_resident)"}),
    Panel("Private adapters", "short", {
        "resident": "sum(polyhead_private_adapters_resident)",
        "in use": "sum(polyhead_private_adapters_pinned)"}),
    Panel("Private adapters moved", "short", {
        "in": rate("polyhead_private_adapter_loads_total"),
        "out": rate("polyhead_private_adapter_evictions_total")}),
    Panel("Fits", "short", {
        "queued": "max(polyhead_fit_jobs_queued)",
        "running": "max(polyhead_fit_jobs_running)"}),
    Panel("Fits that ended", "short", {
        "{{state}}": f"sum by (state) (increase(polyhead_fit_jobs_total{WINDOW}))"}),
    Panel("Share of time with a fit", "percentunit", {"fit": rate("polyhead_fit_seconds_total")}),
    Panel("Registry", "short", {"up": "min(polyhead_registry_up)"}),
    Panel("Behind other replicas' changes", "s", {
        "longest": "max(polyhead_registry_convergence_lag_seconds)"}),
]  # fmt: skip
CAPACITY = [
    Panel("Seats in use", "percentunit", {
        "seats": "sum(polyhead_num_requests_running) / sum(polyhead_max_num_requests_running)"}),
    Panel("Line in use", "percentunit", {
        "line": "sum(polyhead_num_requests_waiting) / sum(polyhead_max_num_requests_waiting)"}),
    Panel("Key-value cache in use", "percentunit", {
        "{{instance}}": "polyhead_kv_cache_usage_perc"}),
    Panel("Tokens in a step", "short", quantiles("polyhead_iteration_tokens")),
    Panel("Preempted", "short", {"sequences": rate("polyhead_num_preemptions_total")}),
    Panel("Steps that failed", "short", {"steps": rate("polyhead_failed_steps_total")}),
    Panel("Task memory in use", "percentunit", {
        "{{instance}}": "polyhead_tasks_resident_bytes / polyhead_tasks_resident_limit_bytes"}),
    Panel("Private adapters' memory", "bytes", {"{{instance}}": "polyhead_private_adapters_bytes"}),
    Panel("Replicas that take requests", "short", {"ready": "sum(polyhead_ready)"}),
    Panel("Memory", "bytes", {"{{instance}}": "process_resident_memory_bytes{job=\"polyhead\"}"}),
    Panel("CPU", "short", {
        "{{instance}}": f'rate(process_cpu_seconds_total{{job="polyhead"}}{WINDOW})'}),
    Panel("Open files", "short", {"{{instance}}": "process_open_fds{job=\"polyhead\"}"}),
]  # fmt: skip
DASHBOARDS: Mapping[str, tuple[str, Sequence[Panel]]] = {
    "serving": ("Polyhead: serving", SERVING),
    "tasks": ("Polyhead: tasks and fitting", TASKS),
    "capacity": ("Polyhead: capacity", CAPACITY),
}


def built(name: str) -> str:
    """One dashboard as Grafana's JSON."""
    title, panels = DASHBOARDS[name]
    made = dashboard.Dashboard(title).uid(f"polyhead-{name}").tags(["polyhead"]).refresh("10s")
    made = made.time("now-30m", "now").timezone("browser")
    for place, panel in enumerate(panels):
        made = made.with_panel(_panel(panel, place))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(panel: Panel, place: int) -> timeseries.Panel:
    row, column = divmod(place, ACROSS)
    made = timeseries.Panel().title(panel.title).unit(panel.unit).min(0).datasource(SOURCE)
    made = made.grid_pos(_place(column * WIDTH, row * HEIGHT))
    for letter, (legend, expression) in zip("ABCDEFGH", panel.queries.items(), strict=False):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter)
        made = made.with_target(query.datasource(SOURCE))
    return made


def _place(x: int, y: int) -> GridPos:
    return GridPos(h=HEIGHT, w=WIDTH, x=x, y=y)


def main() -> None:
    for name in DASHBOARDS:
        (HERE / f"{name}.json").write_text(built(name))


if __name__ == "__main__":
    main()

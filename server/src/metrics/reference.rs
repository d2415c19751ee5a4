//! `docs/metrics.md`, written from the table.

use std::fmt::Write;

use super::metric::{Kind, LabelValues, Metric};
use super::table::GROUPS;

const HEAD: &str = "# Metrics

Written from the table in `server/src/metrics/table.rs` by `make metrics-doc`; a test fails when this page is not what the table
says. `/metrics` has all of them as Prometheus text. A scrape reads counters that are kept in any case: who is not scraped pays
nothing, and what is measured on the way of a request costs two additions to atomics.

Counters begin at 0 when the server starts, those of drives when the store is opened; `rate()` knows. Histograms have bounds of
1 µs, 2 µs, 4 µs .. 33.6 s. What a label can be is listed; a *directory* or *controller* is one of at most 32 of a store.

Telling expressions, as they are in [the dashboard](deploy/grafana/pegaflow.json):

| what | expression |
| --- | --- |
| hit ratio | `sum(rate(pegaflow_lookup_hit_blocks_total[5m])) / sum(rate(pegaflow_lookup_blocks_total[5m]))` |
| 99th percentile of loads from the drive | `histogram_quantile(0.99, sum by (le) (rate(pegaflow_load_seconds_bucket{tier=\"nvme\"}[5m])))` |
| share of a drive's best in use | `pegaflow_drive_ceiling_used_ratio`, or over any time `sum by (path) (rate(pegaflow_drive_transferred_bytes_total{direction=\"read\"}[5m])) / sum by (path) (pegaflow_drive_read_bytes_per_second)` |
| compression | `rate(pegaflow_nvme_written_raw_bytes_total[1h]) / rate(pegaflow_nvme_written_stored_bytes_total[1h])` |
| write amplification | `rate(pegaflow_appended_bytes_total[1h]) / (rate(pegaflow_appended_bytes_total[1h]) - rate(pegaflow_reinserted_bytes_total[1h]))` |
";

/// The page.
pub(crate) fn reference() -> String {
    let mut page = HEAD.to_owned();
    for group in GROUPS {
        let _infallible = write!(
            page,
            "\n## {}\n| metric | kind | unit | labels | meaning |\n| --- | --- | --- | --- | --- |\n",
            group.title
        );
        group.metrics.iter().for_each(|metric| page.push_str(&row(metric)));
    }
    page
}

fn row(metric: &Metric) -> String {
    let kind = match metric.kind {
        Kind::Gauge => "gauge",
        Kind::Counter => "counter",
        Kind::Histogram => "histogram",
    };
    let labels = metric.labels.iter().map(|label| match label.values {
        LabelValues::OneOf(values) => format!("`{}`: {}", label.name, values.join(", ")),
        LabelValues::Few("", _) => format!("`{}`", label.name),
        LabelValues::Few(what, _) => format!("`{}`: {what}", label.name),
    });
    let labels = labels.collect::<Vec<_>>().join("; ");
    format!("| `{}` | {kind} | {} | {labels} | {} |\n", metric.name, metric.unit.as_str(), metric.help)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");

    #[test]
    fn the_page_is_what_the_table_says() {
        let found = std::fs::read_to_string(PAGE).unwrap_or_default();
        let first =
            found.lines().zip(reference().lines()).find(|(there, here)| there != here).map(|(_, here)| here.to_owned());
        assert!(
            found == reference(),
            "docs/metrics.md is out of date, run `make metrics-doc`; the first other line: {first:?}"
        );
    }

    /// `make metrics-doc`
    #[test]
    #[ignore = "writes docs/metrics.md"]
    fn write_the_page() -> std::io::Result<()> {
        std::fs::write(PAGE, reference())
    }
}

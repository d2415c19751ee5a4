//! All metrics as one OTLP message, out of the same table as Prometheus' text.

use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValue_;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Point;
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric as WireMetric, NumberDataPoint,
    ResourceMetrics, ScopeMetrics, Sum,
};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use pegaflow_engine::Latencies;

use crate::metrics::{Kind, Metric, Now, Sample, Unit, Value};

/// These metrics at this moment, counted since `started`.
pub(crate) fn request<'a>(
    metrics: impl Iterator<Item = &'a Metric>,
    now: &Now<'_>,
    started: SystemTime,
) -> ExportMetricsServiceRequest {
    let at = Times { started: nanoseconds(started), now: nanoseconds(SystemTime::now()) };
    let metrics = metrics.map(|metric| wire(metric, metric.samples(now), at)).collect();
    let resource = ResourceAttributesWithSchema::from(&super::resource());
    let scope = InstrumentationScope { name: "pegaflow".into(), ..InstrumentationScope::default() };
    let scope_metrics = vec![ScopeMetrics { scope: Some(scope), metrics, ..ScopeMetrics::default() }];
    let resource = Some(Resource { attributes: resource.attributes.0, ..Resource::default() });
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics { resource, scope_metrics, ..ResourceMetrics::default() }],
    }
}

#[derive(Clone, Copy)]
struct Times {
    started: u64,
    now: u64,
}

fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

fn wire(metric: &Metric, samples: Vec<Sample>, at: Times) -> WireMetric {
    let cumulative = AggregationTemporality::Cumulative as i32;
    let data = match metric.kind {
        Kind::Histogram => Data::Histogram(Histogram {
            data_points: samples.into_iter().filter_map(|sample| histogram(metric, sample, at)).collect(),
            aggregation_temporality: cumulative,
        }),
        kind => {
            let data_points = samples.into_iter().filter_map(|sample| number(metric, sample, at)).collect();
            match kind {
                Kind::Counter => {
                    Data::Sum(Sum { data_points, aggregation_temporality: cumulative, is_monotonic: true })
                }
                _ => Data::Gauge(Gauge { data_points }),
            }
        }
    };
    WireMetric {
        name: metric.name.into(),
        description: metric.help.into(),
        unit: unit(metric.unit).into(),
        data: Some(data),
        ..WireMetric::default()
    }
}

fn number(metric: &Metric, sample: Sample, at: Times) -> Option<NumberDataPoint> {
    let Value::Number(number) = sample.value else { return None };
    Some(NumberDataPoint {
        attributes: attributes(metric, sample.labels),
        start_time_unix_nano: at.started,
        time_unix_nano: at.now,
        value: Some(Point::AsDouble(number)),
        ..NumberDataPoint::default()
    })
}

fn histogram(metric: &Metric, sample: Sample, at: Times) -> Option<HistogramDataPoint> {
    let Value::Times(times) = sample.value else { return None };
    let explicit_bounds: Vec<f64> = Latencies::bounds().collect();
    // One more than there are bounds; trailing zeros are not in the counts.
    let mut bucket_counts = times.counts.clone();
    bucket_counts.resize(explicit_bounds.len() + 1, 0);
    Some(HistogramDataPoint {
        attributes: attributes(metric, sample.labels),
        start_time_unix_nano: at.started,
        time_unix_nano: at.now,
        count: times.count(),
        sum: Some(times.sum_ns as f64 / 1e9),
        bucket_counts,
        explicit_bounds,
        ..HistogramDataPoint::default()
    })
}

fn attributes(metric: &Metric, values: Vec<String>) -> Vec<KeyValue> {
    let text = |value| Some(AnyValue { value: Some(AnyValue_::StringValue(value)) });
    let pairs = metric.labels.iter().zip(values);
    pairs.map(|(label, value)| KeyValue { key: label.name.into(), value: text(value), ..KeyValue::default() }).collect()
}

/// As UCUM has them, which OTLP asks for.
fn unit(unit: Unit) -> &'static str {
    match unit {
        Unit::Bytes => "By",
        Unit::BytesPerSecond => "By/s",
        Unit::Blocks => "{block}",
        Unit::Records => "{record}",
        Unit::Things | Unit::Flag | Unit::Ratio => "1",
        Unit::Percent => "%",
        Unit::Seconds | Unit::UnixSeconds => "s",
        Unit::Nanoseconds => "ns",
    }
}

#[cfg(test)]
mod tests {
    use pegaflow_engine::{LatencyStats, Stats};

    use super::*;
    use crate::metrics::{Metrics, ServerGauges};

    #[test]
    fn numbers_and_histograms_are_those_of_the_text() {
        let stats = Stats {
            saved_blocks: 7,
            lookup_hit_blocks: 9,
            lookup_hit_dram_blocks: 4,
            latencies: LatencyStats {
                load_nvme: Latencies { counts: vec![0, 2, 1], sum_ns: 5000 },
                ..LatencyStats::default()
            },
            ..Stats::default()
        };
        let message = Metrics::new().otlp(&stats, ServerGauges::default());
        let metrics = &message.resource_metrics[0].scope_metrics[0].metrics;
        let find = |name: &str| metrics.iter().find(|metric| metric.name == name).expect(name);
        let Some(Data::Sum(saved)) = &find("pegaflow_saved_blocks_total").data else { panic!("a sum") };
        assert!(saved.is_monotonic);
        assert_eq!(saved.data_points[0].value, Some(Point::AsDouble(7.0)));
        let Some(Data::Sum(hits)) = &find("pegaflow_lookup_hit_blocks_total").data else { panic!("a sum") };
        let labels: Vec<&str> = hits.data_points.iter().map(|point| point.attributes[0].key.as_str()).collect();
        assert_eq!(labels, ["tier", "tier"]);
        let Some(Data::Histogram(loads)) = &find("pegaflow_load_seconds").data else { panic!("a histogram") };
        let nvme = loads.data_points.iter().find(|point| point.count > 0).expect("loads from the drive");
        assert_eq!((nvme.count, nvme.sum, nvme.bucket_counts.iter().sum()), (3, Some(5e-6), 3));
        assert_eq!(nvme.bucket_counts.len(), nvme.explicit_bounds.len() + 1);
        assert_eq!(nvme.bucket_counts[..3], [0, 2, 1]);
        let names = Metrics::new().render(&stats, ServerGauges::default());
        assert!(
            metrics.iter().all(|metric| names.contains(&format!("# TYPE {} ", metric.name))
                || metric.data.as_ref().is_some_and(is_empty)),
            "the same names"
        );
    }

    fn is_empty(data: &Data) -> bool {
        match data {
            Data::Gauge(gauge) => gauge.data_points.is_empty(),
            Data::Sum(sum) => sum.data_points.is_empty(),
            Data::Histogram(histogram) => histogram.data_points.is_empty(),
            _ => true,
        }
    }
}

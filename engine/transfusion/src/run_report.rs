//! What `report.html` of a run shows.
use crate::{
    error::Result,
    metrics,
    report::{Kind, Picture, Report, Scale, Series},
    run::RunConfig,
    run_dir::RunDir,
    train::Progress,
};

/// Writes the report of a run from its metrics and its newest grid.
///
/// # Errors
/// Whatever the disk refuses.
pub(crate) fn write(config: &RunConfig, dir: &RunDir, grid: Option<&Picture>, at: &Progress) -> Result<()> {
    page(config, dir, grid, at)?.write(&dir.report())
}

/// The page, to which a caller may add.
///
/// # Errors
/// If the metrics cannot be read.
pub(crate) fn page(
    config: &RunConfig,
    dir: &RunDir,
    grid: Option<&Picture>,
    at: &Progress,
) -> Result<Report> {
    let records = metrics::read(&dir.metrics())?;
    let points = |name: &str| {
        let name = name.to_string();
        records.iter().filter_map(move |r| r.get(&name).map(|v| (r.step as f64, v))).collect::<Vec<_>>()
    };
    let last = |name: &str| points(name).last().map(|(_, v)| *v);
    let mut page = Report::new(&format!("Run {}", dir.path().display()));
    let mut figures = vec![
        ("steps".into(), format!("{} of {}", at.step, config.train.steps)),
        ("tokens".into(), at.tokens.to_string()),
    ];
    let mut figure = |label: &str, value: Option<f64>| {
        figures.extend(value.map(|v| (label.to_string(), format!("{v:.4}"))));
    };
    figure("validation, nats per token", last("val/text"));
    figure("validation, image error", last("val/image"));
    if config.model.image().is_some() {
        figures.push(("images".into(), at.images.to_string()));
    }
    if at.skipped > 0 {
        figures.push(("skipped steps".into(), at.skipped.to_string()));
    }
    page.figures(&figures);
    let curve = |page: &mut Report, title: &str, y: &str, train: &str, val: &str| {
        let series: Vec<Series> = [("training", train, Kind::Smoothed), ("validation", val, Kind::Marked)]
            .into_iter()
            .map(|(name, key, kind)| Series::new(name, kind, points(key)))
            .filter(|s| !s.points.is_empty())
            .collect();
        if !series.is_empty() {
            page.curve(title, y, Scale::Log, &series);
        }
    };
    page.heading("Losses");
    curve(&mut page, "Text", "nats per token", "loss/text", "val/text");
    curve(&mut page, "Images", "mean squared error", "loss/image", "val/image");
    let levels = |name: &str| (0..10).map(|i| last(&format!("{name}/image/t{i}"))).collect::<Vec<_>>();
    let linear = levels("linear");
    let series = match linear.iter().any(Option::is_some) {
        true => vec![("model".into(), levels("final")), ("best linear denoiser".into(), linear)],
        false => vec![("model".into(), levels("val"))],
    };
    if series[0].1.iter().any(Option::is_some) {
        let groups: Vec<String> = (0..10).map(|i| format!("{}-{}", i * 100, (i + 1) * 100)).collect();
        let heights =
            |(name, v): (String, Vec<Option<f64>>)| (name, v.iter().map(|v| v.unwrap_or(0.0)).collect());
        let series: Vec<(String, Vec<f64>)> = series.into_iter().map(heights).collect();
        page.bars("Image error by noise level", "mean squared error", &groups, &series);
    }
    if let Some(grid) = grid {
        page.heading("Samples");
        page.pictures("Drawn from captions kept for validation", std::slice::from_ref(grid));
    }
    page.heading("Training");
    for (title, y, key) in [
        ("Gradient norm", "before clipping", "grad_norm"),
        ("Learning rate", "", "lr"),
        ("Speed", "tokens per second", "tokens_per_s"),
    ] {
        page.curve(title, y, Scale::Linear, &[Series::new(title, Kind::Line, points(key))]);
    }
    page.heading("Configuration");
    page.summary(&settings(config));
    Ok(page)
}

/// Every setting, dotted.
fn settings(config: &RunConfig) -> Vec<(String, String)> {
    fn walk(prefix: &str, value: &serde_json::Value, out: &mut Vec<(String, String)>) {
        match value {
            serde_json::Value::Object(map) => {
                for (key, value) in map {
                    let dot = if prefix.is_empty() { "" } else { "." };
                    walk(&format!("{prefix}{dot}{key}"), value, out);
                }
            }
            other => out.push((prefix.into(), other.to_string())),
        }
    }
    let mut out = Vec::new();
    walk("", &serde_json::to_value(config).unwrap_or_default(), &mut out);
    out
}

//! How a run tells what it is doing.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::log::Record;

/// What is known after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Mean loss over the targets of this step (nats per token for language models).
    pub loss: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub norm: f64,
    /// Targets (tokens) trained on in this step.
    pub targets: u64,
}

/// Receives the news of a run. Every method may be left as it is.
pub trait Progress {
    /// Training begins, or goes on after `done` steps.
    fn begin(&mut self, _done: u64, _steps: u64) {}
    /// A step was done.
    fn step(&mut self, _report: &StepReport) {}
    /// A line was written to the log.
    fn record(&mut self, _record: &Record) {}
    /// Something a person should know.
    fn notice(&mut self, _text: &str) {}
    /// Training ended.
    fn end(&mut self) {}
}

/// Says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {}

/// A progress bar with loss, speed and time left. Where there is no terminal, the lines
/// of the log go to `tracing` instead.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    begun: Option<(Instant, u64)>,
    targets: u64,
    held_out: String,
    /// Name of the evaluation metric that is shown.
    metric: String,
}

impl Bar {
    /// A bar on standard error that also shows the metric called `metric`.
    pub fn new(metric: &str) -> Self {
        let bar = ProgressBar::hidden();
        Self {
            bar,
            begun: None,
            targets: 0,
            held_out: String::new(),
            metric: metric.to_owned(),
        }
    }
}

impl Progress for Bar {
    fn begin(&mut self, done: u64, steps: u64) {
        let template = "{bar:30.cyan/blue} {pos}/{len}  {msg}  {elapsed} gone, {eta} left";
        self.bar = ProgressBar::new(steps);
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self.bar.set_position(done);
        self.bar.reset_eta();
        self.bar.enable_steady_tick(Duration::from_millis(500));
        self.begun = Some((Instant::now(), done));
    }

    fn step(&mut self, r: &StepReport) {
        self.targets += r.targets;
        let seconds = self.begun.map_or(0.0, |(t, _)| t.elapsed().as_secs_f64());
        let speed = self.targets as f64 / seconds.max(1e-9);
        self.bar.set_position(r.step);
        self.bar.set_message(format!(
            "loss {:.3}{}  {speed:.0} tokens/s",
            r.loss, self.held_out
        ));
    }

    fn record(&mut self, record: &Record) {
        if let Some(x) = record.get(&self.metric).and_then(serde_json::Value::as_f64) {
            self.held_out = format!("  {} {x:.3}", self.metric.replace('_', " "));
        }
        if self.bar.is_hidden() {
            tracing::info!("{}", serde_json::Value::Object(record.clone()));
        }
    }

    fn notice(&mut self, text: &str) {
        if self.bar.is_hidden() {
            tracing::warn!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    fn end(&mut self) {
        self.bar.finish_and_clear();
    }
}

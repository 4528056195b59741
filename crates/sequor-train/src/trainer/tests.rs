use super::*;
use crate::log::{self, Record};
use crate::progress::Silent;
use crate::schedule::Shape;
use sequor_nn::{Device, Init, Kind, ParamBuilder};
use std::fs;
use std::path::Path;

/// A two-layer network with dropout that fits random pairs, drawn in shuffled order.
struct Toy {
    builder: ParamBuilder,
    x: Tensor,
    y: Tensor,
    epoch: u64,
    order: Vec<i64>,
    next: usize,
    /// Rows per micro-batch, in turn.
    batches: Vec<usize>,
    poison: Option<std::ops::Range<u64>>,
}

const ROWS: i64 = 24;

impl Toy {
    fn new(kind: Kind) -> Self {
        let builder = ParamBuilder::init(1, kind, Device::Cpu);
        let _ = builder.matrix("a", &[16, 8], Init::Normal(0.3)).unwrap();
        let _ = builder.matrix("b", &[4, 16], Init::Normal(0.3)).unwrap();
        let _ = builder.vector("norm", &[16], Init::Ones).unwrap();
        let data = ParamBuilder::init(2, Kind::Float, Device::Cpu);
        let x = data
            .matrix("x", &[ROWS, 8], Init::Normal(1.0))
            .unwrap()
            .detach();
        let y = data
            .matrix("y", &[ROWS, 4], Init::Normal(1.0))
            .unwrap()
            .detach();
        let mut toy = Self {
            builder,
            x,
            y,
            epoch: 0,
            order: vec![],
            next: 0,
            batches: vec![5],
            poison: None,
        };
        toy.shuffle();
        toy
    }

    fn shuffle(&mut self) {
        self.order = (0..ROWS).collect();
        Key::new(9, self.epoch)
            .stream(0, Purpose::Data)
            .shuffle(&mut self.order);
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.params()
            .into_iter()
            .find(|p| p.name == name)
            .unwrap()
            .tensor
            .to_kind(Kind::Float)
    }

    fn error(&self, rows: &[i64], dropout: bool) -> Tensor {
        let rows = Tensor::from_slice(rows);
        let h = self
            .x
            .index_select(0, &rows)
            .matmul(&self.tensor("a").tr())
            .relu()
            * self.tensor("norm");
        let h = h.dropout(0.2, dropout);
        (h.matmul(&self.tensor("b").tr()) - self.y.index_select(0, &rows))
            .square()
            .sum(Kind::Float)
    }
}

impl Task for Toy {
    fn params(&self) -> Vec<Param> {
        self.builder.params()
    }

    fn loss(&mut self, ctx: &StepCtx) -> Result<MicroLoss> {
        let n = self.batches[ctx.micro % self.batches.len()];
        if self.next + n > self.order.len() {
            self.epoch += 1;
            self.next = 0;
            self.shuffle();
        }
        let rows = self.order[self.next..self.next + n].to_vec();
        self.next += n;
        let sum = self.error(&rows, true);
        let poisoned = self.poison.as_ref().is_some_and(|p| p.contains(&ctx.step));
        Ok(MicroLoss {
            sum: if poisoned { sum * f64::NAN } else { sum },
            targets: n,
        })
    }

    fn evaluate(&mut self) -> Result<BTreeMap<String, f64>> {
        let all: Vec<i64> = (0..ROWS).collect();
        let loss = self.error(&all, false).double_value(&[]) / ROWS as f64;
        Ok([("held_out".to_owned(), loss)].into())
    }

    fn cursor(&self) -> Value {
        json!({"epoch": self.epoch, "next": self.next})
    }

    fn set_cursor(&mut self, cursor: &Value) -> Result<()> {
        self.epoch = cursor["epoch"].as_u64().unwrap();
        self.next = cursor["next"].as_u64().unwrap() as usize;
        self.shuffle();
        Ok(())
    }

    fn epoch(&self) -> f64 {
        self.epoch as f64 + self.next as f64 / ROWS as f64
    }
}

fn options(steps: u64) -> TrainOptions {
    TrainOptions {
        accumulation: 2,
        seed: 11,
        schedule: Schedule {
            peak: 0.02,
            warmup: 3.min(steps),
            steps,
            shape: Shape::Cosine { min_ratio: 0.1 },
        },
        adamw: AdamWOptions::default(),
        clip: 1.0,
        ema: Some(0.9),
        log_every: 3,
        eval_every: 4,
        metric: "held_out".into(),
        patience: None,
    }
}

fn workplace(dir: &Path) -> Workplace {
    Workplace {
        checkpoints: dir.join("checkpoints"),
        log: dir.join("log.jsonl"),
        save_every: Duration::from_secs(3600),
        config: json!({"toy": 1}),
    }
}

/// Asks to stop when a step is reached.
struct StopAt<'a>(u64, &'a AtomicBool, Vec<String>);

impl Progress for StopAt<'_> {
    fn step(&mut self, report: &StepReport) {
        self.1.store(report.step >= self.0, Ordering::Relaxed);
    }
    fn notice(&mut self, text: &str) {
        self.2.push(text.to_owned());
    }
}

fn train(
    dir: &Path,
    task: &mut Toy,
    options: TrainOptions,
    stop: u64,
    resume: bool,
) -> (Result<Outcome>, Vec<String>) {
    let cancel = AtomicBool::new(false);
    let mut progress = StopAt(stop, &cancel, vec![]);
    let outcome = Trainer::new(task, options, workplace(dir), resume, &mut progress)
        .and_then(|mut t| t.run(&mut progress, &cancel));
    (outcome, progress.2)
}

/// The log without wall times.
fn lines(dir: &Path) -> Vec<Record> {
    let mut records = log::read(&dir.join("log.jsonl")).unwrap();
    records
        .iter_mut()
        .for_each(|r| drop(r.shift_remove("seconds")));
    records
}

fn files(dir: &Path, step: u64) -> [Vec<u8>; 3] {
    let dir = dir.join(format!("checkpoints/step-{step:08}"));
    [
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
    ]
    .map(|n| fs::read(dir.join(n)).unwrap())
}

fn state(dir: &Path) -> TrainerState {
    let state = Store::open(&dir.join("checkpoints"))
        .unwrap()
        .newest(&mut |n| panic!("{n}"))
        .unwrap()
        .unwrap();
    TrainerState {
        seconds: 0.0,
        ..state.state().clone()
    }
}

#[test]
fn an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        train(a.path(), &mut Toy::new(kind), options(20), u64::MAX, false)
            .0
            .unwrap();
        let (first, _) = train(b.path(), &mut Toy::new(kind), options(20), 10, false);
        assert!(matches!(first, Err(Error::Cancelled)));
        assert_eq!(state(b.path()).step, 10);
        // Seeds of other work in between must not matter.
        manual_seed(99);
        train(b.path(), &mut Toy::new(kind), options(20), u64::MAX, true)
            .0
            .unwrap();
        assert_eq!(lines(a.path()), lines(b.path()));
        assert_eq!(state(a.path()), state(b.path()));
        assert_eq!(files(a.path(), 20), files(b.path(), 20));
        assert!(lines(a.path()).len() >= 11);
    }
}

#[test]
fn a_damaged_checkpoint_costs_steps_but_not_the_result() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    train(
        a.path(),
        &mut Toy::new(Kind::Float),
        options(20),
        u64::MAX,
        false,
    )
    .0
    .unwrap();
    train(b.path(), &mut Toy::new(Kind::Float), options(20), 14, false)
        .0
        .unwrap_err();
    let file = b
        .path()
        .join("checkpoints/step-00000014/optimizer.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let (outcome, notices) = train(
        b.path(),
        &mut Toy::new(Kind::Float),
        options(20),
        u64::MAX,
        true,
    );
    assert_eq!(outcome.unwrap().steps, 20);
    assert!(
        notices
            .iter()
            .any(|n| n.contains("step-00000014") && n.contains("optimizer.safetensors")),
        "{notices:?}"
    );
    assert_eq!(lines(a.path()), lines(b.path()));
    assert_eq!(files(a.path(), 20), files(b.path(), 20));
}

#[test]
fn every_target_weighs_the_same_however_batches_are_divided() {
    let run = |batches: &[usize]| {
        let dir = tempfile::tempdir().unwrap();
        let mut toy = Toy::new(Kind::Float);
        toy.batches = batches.to_vec();
        let o = TrainOptions {
            accumulation: batches.len(),
            ema: None,
            ..options(1)
        };
        // Without dropout the division is all that differs.
        toy.order = (0..ROWS).collect();
        let mut no_dropout = NoDropout(toy);
        let mut t = Trainer::new(
            &mut no_dropout,
            o,
            workplace(dir.path()),
            false,
            &mut Silent,
        )
        .unwrap();
        t.run(&mut Silent, &AtomicBool::new(false)).unwrap();
        drop(t);
        no_dropout.0.tensor("a")
    };
    let (whole, split) = (run(&[12]), run(&[3, 7, 2]));
    assert!((whole - split).abs().max().double_value(&[]) < 1e-6);
}

struct NoDropout(Toy);

impl Task for NoDropout {
    fn params(&self) -> Vec<Param> {
        self.0.params()
    }
    fn loss(&mut self, ctx: &StepCtx) -> Result<MicroLoss> {
        let n = self.0.batches[ctx.micro];
        let rows: Vec<i64> = (self.0.next..self.0.next + n).map(|i| i as i64).collect();
        self.0.next += n;
        Ok(MicroLoss {
            sum: self.0.error(&rows, false),
            targets: n,
        })
    }
    fn evaluate(&mut self) -> Result<BTreeMap<String, f64>> {
        self.0.evaluate()
    }
    fn cursor(&self) -> Value {
        Value::Null
    }
    fn set_cursor(&mut self, _: &Value) -> Result<()> {
        Ok(())
    }
}

#[test]
fn the_loss_falls_and_the_best_weights_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut toy = Toy::new(Kind::Float);
    let before = toy.evaluate().unwrap()["held_out"];
    let o = TrainOptions {
        patience: Some(2),
        eval_every: 10,
        ..options(400)
    };
    let mut trainer = Trainer::new(&mut toy, o, workplace(dir.path()), false, &mut Silent).unwrap();
    let outcome = trainer.run(&mut Silent, &AtomicBool::new(false)).unwrap();
    trainer.finish_with_best().unwrap();
    let best = outcome.best.unwrap();
    assert_eq!(toy.evaluate().unwrap()["held_out"], best.value);
    assert!(best.value < 0.7 * before, "{before} {}", best.value);
    assert!(outcome.ended == Ended::Early || outcome.steps == 400);
    if outcome.ended == Ended::Early {
        assert_eq!(outcome.steps, best.step + 20);
        // A run that ended early has nothing left to do.
        let o = TrainOptions {
            patience: Some(2),
            eval_every: 10,
            ..options(400)
        };
        let again = train(dir.path(), &mut Toy::new(Kind::Float), o, u64::MAX, true)
            .0
            .unwrap();
        assert_eq!((again.steps, again.ended), (outcome.steps, Ended::Early));
    }
}

#[test]
fn steps_without_a_finite_gradient_are_skipped_counted_and_in_the_end_fatal() {
    let dir = tempfile::tempdir().unwrap();
    let mut toy = Toy::new(Kind::Float);
    toy.poison = Some(3..5);
    let (outcome, notices) = train(dir.path(), &mut toy, options(8), u64::MAX, false);
    assert_eq!(outcome.unwrap().skipped, 2);
    assert_eq!(notices.len(), 2);
    assert!(toy.tensor("a").isfinite().all().int64_value(&[]) == 1);

    let dir = tempfile::tempdir().unwrap();
    toy.poison = Some(0..1000);
    let (outcome, _) = train(dir.path(), &mut toy, options(200), u64::MAX, false);
    assert!(matches!(outcome, Err(Error::Diverged { .. })));
}

#[test]
fn other_settings_and_forgotten_flags_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &mut Toy::new(Kind::Float), options(8), 4, false)
        .0
        .unwrap_err();
    let message = train(dir.path(), &mut Toy::new(Kind::Float), options(8), 4, false)
        .0
        .unwrap_err()
        .to_string();
    assert!(message.contains("resume"), "{message}");
    let other = Workplace {
        config: json!({"toy": 2}),
        ..workplace(dir.path())
    };
    let mut toy = Toy::new(Kind::Float);
    let error = Trainer::new(&mut toy, options(8), other, true, &mut Silent)
        .err()
        .unwrap();
    assert!(
        matches!(&error, Error::Resume { field, .. } if field == "toy"),
        "{error}"
    );
    let bad = TrainOptions {
        accumulation: 0,
        ..options(8)
    };
    assert!(
        train(dir.path(), &mut toy, bad, 4, true)
            .0
            .unwrap_err()
            .to_string()
            .contains("accumulation")
    );
    let missing = TrainOptions {
        metric: "accuracy".into(),
        ..options(8)
    };
    let message = train(dir.path(), &mut Toy::new(Kind::Float), missing, 8, true)
        .0
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("accuracy") && message.contains("held_out"),
        "{message}"
    );
}

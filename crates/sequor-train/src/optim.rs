//! AdamW with decoupled weight decay (Loshchilov and Hutter, 2019).
//!
//! libtorch's optimizers cannot save their state, so a run that was interrupted
//! could never go on exactly as it would have. This one keeps its moments, and the
//! f32 master weights of parameters that are stored in fewer bits, in flat vectors
//! that are saved by name.

use sequor_nn::Tensor;
use sequor_nn::tch::no_grad_guard;
use sequor_nn::weights::TensorSource;
use serde::{Deserialize, Serialize};

use crate::flat::Layout;
use crate::{Error, Result};

/// Constants of AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWOptions {
    /// Decay rates of the first and second moment, each in `[0, 1)`.
    pub betas: (f64, f64),
    /// Added to the root of the second moment; positive.
    pub eps: f64,
    /// Share of a decaying weight that is removed per unit of learning rate, at least 0.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self {
            betas: (0.9, 0.95),
            eps: 1e-8,
            weight_decay: 0.1,
        }
    }
}

impl AdamWOptions {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] naming the constant.
    pub fn validate(&self) -> Result<()> {
        for (name, beta) in [("betas[0]", self.betas.0), ("betas[1]", self.betas.1)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::Config(format!("{name} = {beta} must lie in [0, 1)")));
            }
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return Err(Error::Config(format!(
                "eps = {} must be positive",
                self.eps
            )));
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return Err(Error::Config(format!(
                "weight_decay = {} must be at least 0",
                self.weight_decay
            )));
        }
        Ok(())
    }
}

/// The optimizer's state.
#[derive(Debug)]
pub struct AdamW {
    options: AdamWOptions,
    /// f32 weights, the truth of which the model's parameters are rounded copies.
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    updates: u64,
}

/// Endings of the names under which state is saved.
const MASTER: &str = ".master";
const EXP_AVG: &str = ".exp_avg";
const EXP_AVG_SQ: &str = ".exp_avg_sq";

impl AdamW {
    /// Begins at the parameters' present values with moments of zero.
    ///
    /// # Errors
    /// As [`AdamWOptions::validate`], or when there is no memory.
    pub fn new(layout: &Layout, options: AdamWOptions) -> Result<Self> {
        options.validate()?;
        let (exp_avg, exp_avg_sq) = (layout.zeros()?, layout.zeros()?);
        Ok(Self {
            options,
            master: layout.gather()?,
            exp_avg,
            exp_avg_sq,
            updates: 0,
        })
    }

    /// One update against the flat gradient, with learning rate `lr`; the new weights
    /// are written to the model's parameters.
    ///
    /// # Errors
    /// When `gradient` has another length than the layout.
    pub fn step(&mut self, layout: &Layout, gradient: &Tensor, lr: f64) -> Result<()> {
        let _no_grad = no_grad_guard();
        let AdamWOptions {
            betas: (b1, b2),
            eps,
            weight_decay,
        } = self.options;
        self.updates += 1;
        let t = self.updates as f64;
        let _ = self.exp_avg.f_lerp_(gradient, 1.0 - b1)?;
        let _ = self.exp_avg_sq.f_lerp_(&gradient.f_square()?, 1.0 - b2)?;
        if weight_decay > 0.0 && layout.decayed() > 0 {
            let _ = self
                .master
                .f_narrow(0, 0, layout.decayed())?
                .f_mul_scalar_(1.0 - lr * weight_decay)?;
        }
        // The bias corrections 1 - b^t make up for moments that began at zero.
        let root = self
            .exp_avg_sq
            .f_sqrt()?
            .f_mul_scalar_((1.0 - b2.powf(t)).sqrt().recip())?
            .f_add_scalar_(eps)?;
        let update = self
            .exp_avg
            .f_div(&root)?
            .f_mul_scalar_(-lr / (1.0 - b1.powf(t)))?;
        let _ = self.master.f_add_(&update)?;
        layout.publish(&self.master)
    }

    /// The f32 weights as a flat vector.
    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// How many updates were made; decides the bias corrections.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The state by name: `NAME.exp_avg`, `NAME.exp_avg_sq`, and `NAME.master` when a
    /// parameter is stored in fewer bits than 32.
    ///
    /// # Errors
    /// When the layout is another than that of the start.
    pub fn state(&self, layout: &Layout) -> Result<Vec<(String, Tensor)>> {
        let mut state = layout.named(&self.exp_avg, EXP_AVG)?;
        state.extend(layout.named(&self.exp_avg_sq, EXP_AVG_SQ)?);
        if !layout.is_f32() {
            state.extend(layout.named(&self.master, MASTER)?);
        }
        Ok(state)
    }

    /// Takes up saved state, together with the number of updates it had seen. The
    /// model's parameters must have been loaded before; those in fewer bits are
    /// written again from the master weights.
    ///
    /// # Errors
    /// [`Error::Weights`] naming a tensor that is missing or has another shape.
    pub fn load(&mut self, layout: &Layout, source: &dyn TensorSource, updates: u64) -> Result<()> {
        layout.fill(&self.exp_avg, EXP_AVG, source)?;
        layout.fill(&self.exp_avg_sq, EXP_AVG_SQ, source)?;
        if layout.is_f32() {
            self.master = layout.gather()?;
        } else {
            layout.fill(&self.master, MASTER, source)?;
            layout.publish(&self.master)?;
        }
        self.updates = updates;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flat::tests::builder;
    use sequor_nn::{Kind, Tensor};

    /// AdamW as in the paper's algorithm 2, on plain numbers.
    struct Reference {
        w: Vec<f64>,
        m: Vec<f64>,
        v: Vec<f64>,
    }

    impl Reference {
        fn step(&mut self, g: &[f64], lr: f64, t: i32, o: AdamWOptions, decayed: usize) {
            for (i, &g) in g.iter().enumerate() {
                self.m[i] = o.betas.0 * self.m[i] + (1.0 - o.betas.0) * g;
                self.v[i] = o.betas.1 * self.v[i] + (1.0 - o.betas.1) * g * g;
                let m = self.m[i] / (1.0 - o.betas.0.powi(t));
                let v = self.v[i] / (1.0 - o.betas.1.powi(t));
                let decay = if i < decayed { o.weight_decay } else { 0.0 };
                self.w[i] -= lr * (m / (v.sqrt() + o.eps) + decay * self.w[i]);
            }
        }
    }

    fn gradient(step: usize) -> Vec<f64> {
        (0..11)
            .map(|i| (0.7 * i as f64 + 1.3 * step as f64).sin() * 0.1f64.powi(i % 3))
            .collect()
    }

    fn flat(values: &[f64]) -> Tensor {
        Tensor::from_slice(values).to_kind(Kind::Float)
    }

    fn values(t: &Tensor) -> Vec<f64> {
        Vec::try_from(t.to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn agrees_with_the_paper_and_decays_matrices_only() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let layout = Layout::new(builder(kind).params()).unwrap();
            let options = AdamWOptions {
                weight_decay: 0.3,
                ..Default::default()
            };
            let mut adamw = AdamW::new(&layout, options).unwrap();
            let w = values(adamw.master());
            let mut reference = Reference {
                m: vec![0.0; w.len()],
                v: vec![0.0; w.len()],
                w,
            };
            for t in 1..=30 {
                let g = gradient(t);
                adamw.step(&layout, &flat(&g), 0.01).unwrap();
                reference.step(&g, 0.01, t as i32, options, 6);
            }
            for (got, want) in values(adamw.master()).iter().zip(&reference.w) {
                assert!((got - want).abs() < 2e-6, "{got} {want}");
            }
            // The model computes with the rounded master weights.
            let rounded = adamw.master().to_kind(kind).to_kind(Kind::Float);
            let norm = 6..9; // always f32
            for (i, (got, want)) in values(&layout.gather().unwrap())
                .iter()
                .zip(values(&rounded))
                .enumerate()
            {
                assert!(*got == want || norm.contains(&i));
            }
        }
    }

    #[test]
    fn options_out_of_range_are_named() {
        let check = |o: AdamWOptions| o.validate().unwrap_err().to_string();
        assert!(
            check(AdamWOptions {
                betas: (0.9, 1.0),
                ..Default::default()
            })
            .contains("betas[1]")
        );
        assert!(
            check(AdamWOptions {
                eps: 0.0,
                ..Default::default()
            })
            .contains("eps")
        );
        assert!(
            check(AdamWOptions {
                weight_decay: f64::NAN,
                ..Default::default()
            })
            .contains("weight_decay")
        );
    }
}

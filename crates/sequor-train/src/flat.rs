//! All parameters of a model as one long vector.
//!
//! Gradients, optimizer moments, master weights and averages live in flat f32
//! vectors of the same layout, so that an optimizer step, a norm or an all-reduce is
//! a handful of tensor operations whatever the number of parameters. Parameters that
//! decay come first, so that weight decay acts on a prefix.

use sequor_nn::params::{Param, Role};
use sequor_nn::tch::no_grad_guard;
use sequor_nn::weights::TensorSource;
use sequor_nn::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Where each parameter lies in a flat vector.
#[derive(Debug)]
pub struct Layout {
    slots: Vec<Slot>,
    decayed: i64,
    total: i64,
    device: Device,
}

/// One parameter's place.
#[derive(Debug)]
struct Slot {
    name: String,
    /// The tensor that the model computes with, in its own number format.
    param: Tensor,
    shape: Vec<i64>,
    offset: i64,
    len: i64,
}

impl Layout {
    /// Lays out the parameters of a model: first those that decay (matrices of two or
    /// more dimensions), then norms, biases and other vectors; by name within each.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no parameter, a name occurs twice, a parameter
    /// does not require gradients, or they lie on several devices.
    pub fn new(mut params: Vec<Param>) -> Result<Self> {
        let decays = |p: &Param| p.role == Role::Matrix && p.tensor.dim() >= 2;
        params.sort_by(|a, b| decays(b).cmp(&decays(a)).then_with(|| a.name.cmp(&b.name)));
        let Some(device) = params.first().map(|p| p.tensor.device()) else {
            return Err(Error::Input("the model has no parameters to train".into()));
        };
        let (mut slots, mut total, mut decayed) = (Vec::<Slot>::with_capacity(params.len()), 0, 0);
        for p in params {
            if !p.tensor.requires_grad() || p.tensor.device() != device {
                let what = format!(
                    "parameter '{}' must require gradients and lie on {device:?}",
                    p.name
                );
                return Err(Error::Input(what));
            }
            let shape = p.tensor.size();
            let len = shape.iter().product::<i64>();
            let decay = decays(&p);
            slots.push(Slot {
                name: p.name,
                param: p.tensor,
                shape,
                offset: total,
                len,
            });
            total += len;
            if decay {
                decayed = total;
            }
        }
        let mut names: Vec<&str> = slots.iter().map(|s| s.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::Input(format!(
                "parameter '{}' occurs twice",
                twice[0]
            )));
        }
        Ok(Self {
            slots,
            decayed,
            total,
            device,
        })
    }

    /// Number of values.
    pub fn len(&self) -> i64 {
        self.total
    }

    /// Is there nothing to train? (Never for a layout that was made.)
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// Number of values at the start of a flat vector that weight decay acts on.
    pub fn decayed(&self) -> i64 {
        self.decayed
    }

    /// Are all parameters f32, so that the model computes with the master weights?
    pub fn is_f32(&self) -> bool {
        self.slots.iter().all(|s| s.param.kind() == Kind::Float)
    }

    /// The tensors the model computes with, in the order of the layout.
    pub(crate) fn params(&self) -> Vec<Tensor> {
        self.slots.iter().map(|s| s.param.shallow_clone()).collect()
    }

    /// A flat f32 vector of zeros.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn zeros(&self) -> Result<Tensor> {
        Ok(Tensor::f_zeros([self.total], (Kind::Float, self.device))?)
    }

    /// The part of a flat vector that belongs to each parameter, in its shape. The
    /// tensors share the vector's storage.
    ///
    /// # Errors
    /// When `flat` has another length.
    pub fn views(&self, flat: &Tensor) -> Result<Vec<Tensor>> {
        self.slots
            .iter()
            .map(|s| {
                Ok(flat
                    .f_narrow(0, s.offset, s.len)?
                    .f_view(s.shape.as_slice())?)
            })
            .collect()
    }

    /// The model's parameters as a flat f32 vector (a copy).
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn gather(&self) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        let flat = self.zeros()?;
        for (mut view, slot) in self.views(&flat)?.into_iter().zip(&self.slots) {
            view.f_copy_(&slot.param)?;
        }
        Ok(flat)
    }

    /// Writes a flat vector into the model's parameters, rounding to their number format.
    ///
    /// # Errors
    /// When `flat` has another length.
    pub fn publish(&self, flat: &Tensor) -> Result<()> {
        let _no_grad = no_grad_guard();
        for (view, slot) in self.views(flat)?.iter().zip(&self.slots) {
            slot.param.shallow_clone().f_copy_(view)?;
        }
        Ok(())
    }

    /// The parts of a flat vector by name, each with `suffix` appended: a state dict.
    ///
    /// # Errors
    /// When `flat` has another length.
    pub fn named(&self, flat: &Tensor, suffix: &str) -> Result<Vec<(String, Tensor)>> {
        Ok(self
            .slots
            .iter()
            .map(|s| format!("{}{suffix}", s.name))
            .zip(self.views(flat)?)
            .collect())
    }

    /// The parameters as the model has them, by name.
    ///
    /// # Errors
    /// When libtorch cannot detach one of them.
    pub fn named_params(&self) -> Result<Vec<(String, Tensor)>> {
        self.slots
            .iter()
            .map(|s| Ok((s.name.clone(), s.param.f_detach()?)))
            .collect()
    }

    /// Fills a flat vector from a state dict written by [`named`](Self::named).
    ///
    /// # Errors
    /// [`Error::Weights`] naming a tensor that is missing or has another shape.
    pub fn fill(&self, flat: &Tensor, suffix: &str, source: &dyn TensorSource) -> Result<()> {
        let _no_grad = no_grad_guard();
        for (mut view, slot) in self.views(flat)?.into_iter().zip(&self.slots) {
            let name = format!("{}{suffix}", slot.name);
            let found = source.info(&name).map(|i| i.shape);
            if found.as_ref() != Some(&slot.shape) {
                let found = found.map_or("it is missing".into(), |f| format!("the file has {f:?}"));
                let what = format!(
                    "tensor '{name}' must be {:?}, but {found}; this checkpoint is of another model",
                    slot.shape
                );
                return Err(Error::weights(source.path(), what));
            }
            view.f_copy_(&source.load(&name)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use sequor_nn::{Init, ParamBuilder};

    /// A matrix, a vector and an awkwardly named matrix of one dimension.
    pub(crate) fn builder(kind: Kind) -> ParamBuilder {
        let p = ParamBuilder::init(5, kind, Device::Cpu);
        let _ = p.vector("a.norm", &[3], Init::Ones).unwrap();
        let _ = p.matrix("b.bias", &[2], Init::Normal(1.0)).unwrap();
        let _ = p.matrix("z.weight", &[2, 3], Init::Normal(1.0)).unwrap();
        p
    }

    #[test]
    fn decayed_parameters_come_first_and_round_trip() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let layout = Layout::new(builder(kind).params()).unwrap();
            assert_eq!(
                (layout.len(), layout.decayed(), layout.is_f32()),
                (11, 6, kind == Kind::Float)
            );
            let flat = layout.gather().unwrap();
            let names: Vec<String> = layout
                .named(&flat, ".m")
                .unwrap()
                .into_iter()
                .map(|(n, _)| n)
                .collect();
            assert_eq!(names, ["z.weight.m", "a.norm.m", "b.bias.m"]);
            layout.publish(&(&flat * 2.0)).unwrap();
            assert!(layout.gather().unwrap().equal(&(flat * 2.0)));
            assert!(layout.params().iter().all(Tensor::requires_grad));
        }
    }

    #[test]
    fn what_cannot_be_trained_is_refused() {
        assert!(Layout::new(Vec::new()).is_err());
        let twice = [0, 1]
            .into_iter()
            .flat_map(|_| builder(Kind::Float).params())
            .collect();
        assert!(
            Layout::new(twice)
                .unwrap_err()
                .to_string()
                .contains("occurs twice")
        );
        let fixed = Param {
            name: "x".into(),
            tensor: Tensor::zeros([2], (Kind::Float, Device::Cpu)),
            role: Role::Vector,
        };
        assert!(
            Layout::new(vec![fixed])
                .unwrap_err()
                .to_string()
                .contains("'x'")
        );
    }
}

//! Linear layers: `y = x W^T + b`.

use crate::lora::Lora;
use crate::matrix::Matrix;
use crate::{Error, Init, ParamBuilder, Result};
use tch::Tensor;

/// A linear layer. Input and output are f32; the weight is kept as [`Matrix`] says.
#[derive(Debug)]
pub struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
    input: i64,
    output: i64,
    /// Low-rank updates, each with the first of the outputs that it changes.
    updates: Vec<(i64, Lora)>,
    /// The weight without the updates, while they are merged into `weight`.
    unmerged: Option<Matrix>,
}

impl Linear {
    fn plain(weight: Matrix, bias: Option<Tensor>) -> Self {
        Self {
            input: weight.input(),
            output: weight.output(),
            weight,
            bias,
            updates: Vec::new(),
            unmerged: None,
        }
    }

    /// Parameters `weight` `[output, input]`, and `bias` `[output]` when asked for; the
    /// pair of a low-rank update where the builder adapts this layer
    /// ([`ParamBuilder::with_lora`]).
    ///
    /// # Errors
    /// When a weight file cannot be read.
    pub fn new(p: &ParamBuilder, input: i64, output: i64, bias: bool, init: Init) -> Result<Self> {
        let weight = p.weight("weight", output, input, init)?;
        let bias = if bias {
            Some(p.matrix("bias", &[output], Init::Zeros)?)
        } else {
            None
        };
        let mut layer = Self::plain(weight, bias);
        if let Some(update) = p.lora(input, output)? {
            layer.updates.push((0, update));
        }
        Ok(layer)
    }

    /// A layer over an existing matrix, such as a tied embedding.
    #[must_use]
    pub fn from_matrix(weight: Matrix) -> Self {
        Self::plain(weight, None)
    }

    /// Several layers over the same input as one, outputs side by side: one pass
    /// over memory and one call instead of several. For inference only: the
    /// joined matrix is a copy. Attached low-rank updates keep acting on their part of the
    /// outputs; merged ones become part of the weight.
    ///
    /// # Errors
    /// [`Error::Config`] when inputs differ or only some layers have a bias.
    pub fn join(parts: &[Self]) -> Result<Self> {
        let input = parts.first().map_or(0, |l| l.input);
        if parts
            .iter()
            .any(|l| l.input != input || l.bias.is_some() != parts.iter().all(|l| l.bias.is_some()))
        {
            return Err(Error::Config(
                "layers to be joined must share their input and their use of biases".into(),
            ));
        }
        let weights: Vec<&Matrix> = parts.iter().map(|l| &l.weight).collect();
        let weight = Matrix::join(&weights)?.ok_or_else(|| {
            Error::Config(
                "layers that are kept in different ways, or packed, cannot be joined".into(),
            )
        })?;
        let biases: Vec<&Tensor> = parts.iter().filter_map(|l| l.bias.as_ref()).collect();
        let bias = if biases.is_empty() {
            None
        } else {
            Some(Tensor::f_cat(&biases, 0)?)
        };
        let mut joined = Self::plain(weight, bias);
        let mut start = 0;
        for part in parts {
            let attached = part.updates.iter().filter(|_| part.unmerged.is_none());
            joined
                .updates
                .extend(attached.map(|(first, u)| (start + first, u.share())));
            start += part.output;
        }
        Ok(joined)
    }

    /// Length of the input rows.
    pub fn input(&self) -> i64 {
        self.input
    }

    /// Length of the output rows.
    pub fn output(&self) -> i64 {
        self.output
    }

    /// The layer with only these outputs, in this order: a head that scores a part of the
    /// vocabulary. The rows are copied.
    ///
    /// # Errors
    /// [`Error::Input`] when an output does not exist, or a low-rank update is attached and
    /// not merged.
    pub fn select_outputs(&self, outputs: &[u32]) -> Result<Self> {
        if !self.updates.is_empty() && self.unmerged.is_none() {
            return Err(Error::Input(
                "a layer with a low-rank update can be cut once the update is merged".into(),
            ));
        }
        let weight = self.weight.select(outputs)?;
        let bias = match &self.bias {
            Some(b) => {
                let index: Vec<i64> = outputs.iter().map(|&o| i64::from(o)).collect();
                let index = Tensor::f_from_slice(&index)?.f_to_device(b.device())?;
                Some(b.f_index_select(0, &index)?)
            }
            None => None,
        };
        Ok(Self::plain(weight, bias))
    }

    /// Adds a low-rank update to the outputs from `first` on (0 for a layer of its own;
    /// the place of a part in a joined one). Several updates add up.
    ///
    /// # Errors
    /// [`Error::Input`] when the update does not fit, or others are merged.
    pub fn attach(&mut self, first: i64, update: Lora) -> Result<()> {
        let fits = first >= 0
            && update.input() == self.input
            && first
                .checked_add(update.output())
                .is_some_and(|end| end <= self.output);
        if !fits {
            return Err(Error::Input(format!(
                "a low-rank update [{}, {}] from output {first} does not fit a layer [{}, {}]",
                update.output(),
                update.input(),
                self.output,
                self.input
            )));
        }
        if self.unmerged.is_some() {
            return Err(Error::Input(
                "unmerge the updates before attaching another".into(),
            ));
        }
        self.updates.push((first, update));
        Ok(())
    }

    /// Puts the attached updates into the weight: the layer is as fast as without. The sum
    /// is made in f32 and rounded once to the format of the weight; in bf16 a change below
    /// 1/256 of an entry is lost. The old weight is kept for
    /// [`unmerge`](Self::unmerge), so that a merged layer takes twice the memory
    /// ([`LoraMerged`](crate::lora::LoraMerged) merges without).
    ///
    /// # Errors
    /// When there is no memory for the sum.
    pub fn merge(&mut self) -> Result<()> {
        if self.updates.is_empty() || self.unmerged.is_some() {
            return Ok(());
        }
        let merged = self.weight.changed(|sum| {
            for (first, update) in &self.updates {
                let part = sum.f_narrow(0, *first, update.output())?;
                let _ = { part }.f_add_(&update.delta()?)?;
            }
            Ok(())
        })?;
        self.unmerged = Some(std::mem::replace(&mut self.weight, merged));
        Ok(())
    }

    /// Takes merged updates out again. The weight is the one from before, bit for bit, in
    /// every format; the updates stay attached.
    ///
    /// # Errors
    /// None at present.
    pub fn unmerge(&mut self) -> Result<()> {
        if let Some(weight) = self.unmerged.take() {
            self.weight = weight;
        }
        Ok(())
    }

    /// Takes all updates off, unmerging them first.
    ///
    /// # Errors
    /// As [`unmerge`](Self::unmerge).
    pub fn detach(&mut self) -> Result<()> {
        self.unmerge()?;
        self.updates.clear();
        Ok(())
    }

    /// Puts the weight into the order that suits this machine's kernels. For inference
    /// only: a parameter in training stays as it is.
    ///
    /// # Errors
    /// When libtorch cannot make the copy.
    pub fn packed(self, p: &ParamBuilder) -> Result<Self> {
        if p.may_join() { self.pack() } else { Ok(self) }
    }

    pub(crate) fn pack(self) -> Result<Self> {
        let weight = self.weight.pack()?;
        Ok(Self { weight, ..self })
    }

    /// Bytes of weights that one pass reads.
    pub fn bytes(&self) -> usize {
        let attached = self.updates.iter().filter(|_| self.unmerged.is_none());
        let updates: usize = attached.map(|(_, u)| u.bytes()).sum();
        self.weight.bytes() + updates
    }

    /// `x`: `[.., input]` f32; gives `[.., output]` f32.
    ///
    /// # Errors
    /// When the last dimension is not `input`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = self.weight.product(x, self.bias.as_ref())?;
        if self.unmerged.is_some() {
            return Ok(y);
        }
        for (first, update) in &self.updates {
            let change = update.forward(x)?;
            if update.output() == self.output {
                y = y.f_add(&change)?;
            } else {
                let _ = y.f_narrow(-1, *first, update.output())?.f_add_(&change)?;
            }
        }
        Ok(y)
    }
}

/// Several linear layers over one input: joined into one matrix for inference,
/// kept apart for training so that every parameter keeps its published name.
#[derive(Debug)]
pub struct Joined {
    parts: Vec<Linear>,
    widths: Vec<i64>,
}

impl Joined {
    /// Takes the layers in the order of their outputs, and makes one matrix of them when
    /// `p` allows it.
    ///
    /// # Errors
    /// As [`Linear::join`].
    pub fn new(parts: Vec<Linear>, p: &ParamBuilder) -> Result<Self> {
        let widths = parts.iter().map(Linear::output).collect();
        let uniform =
            parts.iter().all(|l| l.bias.is_some()) || parts.iter().all(|l| l.bias.is_none());
        let weights: Vec<&Matrix> = parts.iter().map(|l| &l.weight).collect();
        let parts = if !p.may_join() {
            parts
        } else if uniform && Matrix::may_join(&weights) {
            vec![Linear::join(&parts)?.pack()?]
        } else {
            parts.into_iter().map(Linear::pack).collect::<Result<_>>()?
        };
        Ok(Self { parts, widths })
    }

    /// Adds a low-rank update to layer number `part`.
    ///
    /// # Errors
    /// [`Error::Input`] when there is no such layer; as [`Linear::attach`].
    pub fn attach(&mut self, part: usize, update: Lora) -> Result<()> {
        let widths = &self.widths;
        if widths.get(part) != Some(&update.output()) {
            return Err(Error::Input(format!(
                "a low-rank update of {} outputs for part {part} of layers with {widths:?} outputs",
                update.output()
            )));
        }
        let before = widths.iter().take(part).sum();
        match &mut self.parts[..] {
            [only] => only.attach(before, update),
            parts => match parts.get_mut(part) {
                Some(layer) => layer.attach(0, update),
                None => Err(Error::Input(format!("there is no part {part}"))),
            },
        }
    }

    /// As [`Linear::merge`], for all layers.
    ///
    /// # Errors
    /// As [`Linear::merge`].
    pub fn merge(&mut self) -> Result<()> {
        self.parts.iter_mut().try_for_each(Linear::merge)
    }

    /// As [`Linear::unmerge`], for all layers.
    ///
    /// # Errors
    /// As [`Linear::unmerge`].
    pub fn unmerge(&mut self) -> Result<()> {
        self.parts.iter_mut().try_for_each(Linear::unmerge)
    }

    /// As [`Linear::detach`], for all layers.
    ///
    /// # Errors
    /// As [`Linear::detach`].
    pub fn detach(&mut self) -> Result<()> {
        self.parts.iter_mut().try_for_each(Linear::detach)
    }

    /// Widths of the outputs, in order.
    pub fn widths(&self) -> &[i64] {
        &self.widths
    }

    /// `x`: `[.., input]`; gives `[.., sum of widths]`.
    ///
    /// # Errors
    /// When the last dimension does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let [only] = &self.parts[..] {
            return only.forward(x);
        }
        let outs: Vec<Tensor> = self
            .parts
            .iter()
            .map(|l| l.forward(x))
            .collect::<Result<_>>()?;
        Ok(Tensor::f_cat(&outs, -1)?)
    }

    /// Bytes of weights that one pass reads.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Linear::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn joined_and_packed_layers_equal_separate_ones() {
        for bias in [false, true] {
            let p = ParamBuilder::init(7, Kind::Float, Device::Cpu);
            let layers = || -> Vec<Linear> {
                [3, 2, 4]
                    .iter()
                    .enumerate()
                    .map(|(i, &n)| Linear::new(&p.pp(i), 5, n, bias, Init::Normal(1.0)).unwrap())
                    .collect()
            };
            let x = Tensor::from_slice(&[0.5f32, -1.0, 2.0, 0.1, 0.7]).reshape([1, 5]);
            let apart = Joined::new(layers(), &p).unwrap().forward(&x).unwrap();
            let joined = Linear::join(&layers()).unwrap();
            assert_eq!(joined.bytes(), 4 * 9 * 5);
            let close = |l: &Linear| {
                let diff = (&apart - l.forward(&x).unwrap())
                    .abs()
                    .max()
                    .double_value(&[]);
                assert!(diff < 1e-6, "{diff}");
            };
            close(&joined);
            let part = |l: &Linear| l.select_outputs(&[8, 0, 3]).unwrap().forward(&x).unwrap();
            let expected = apart.index_select(1, &Tensor::from_slice(&[8i64, 0, 3]));
            let near = |y: Tensor| (y - &expected).abs().max().double_value(&[]) < 1e-6;
            assert!(near(part(&joined)));
            assert!(joined.select_outputs(&[9]).is_err());
            let packed = joined.pack().unwrap();
            assert!(near(part(&packed)));
            assert!(matches!(packed.weight, Matrix::Transposed(_)));
            close(&packed);
            assert!(Linear::join(&[packed]).is_err());
        }
    }

    #[test]
    fn sixteen_bit_weights_take_and_give_f32() {
        let p = ParamBuilder::init(7, Kind::BFloat16, Device::Cpu);
        let l = Linear::new(&p, 4, 3, true, Init::Normal(1.0)).unwrap();
        let y = l
            .forward(&Tensor::ones([2, 4], (Kind::Float, Device::Cpu)))
            .unwrap();
        assert_eq!((y.kind(), y.size()), (Kind::Float, vec![2, 3]));
        assert!(
            l.forward(&Tensor::ones([2, 5], (Kind::Float, Device::Cpu)))
                .is_err()
        );
    }
}

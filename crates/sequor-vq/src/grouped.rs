//! Grouped residual quantisation: the channels are split, each part has levels of its own.

use crate::config::at_least;
use crate::quantizer::{Encoded, Quantizer, Trained, part_key, total};
use crate::residual::{ResidualVq, ResidualVqConfig, no_level};
use crate::rows::Rows;
use crate::{Error, Result};
use sequor_kernels::rng::Key;
use sequor_nn::{ParamBuilder, Tensor};
use serde::{Deserialize, Serialize};

/// Configuration of a [`GroupedResidualVq`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GroupedResidualVqConfig {
    /// Number of groups. Must be given.
    pub groups: i64,
    /// The quantiser of each group; its `dim` is that of a group.
    pub residual: ResidualVqConfig,
}

impl GroupedResidualVqConfig {
    /// `groups` groups, each with `residual`.
    #[must_use]
    pub fn new(groups: i64, residual: ResidualVqConfig) -> Self {
        Self { groups, residual }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn validate(&self) -> Result<()> {
        at_least("groups", self.groups.max(0) as u64, 1)?;
        if self.groups > 1 << 16 {
            return Err(Error::config("groups", self.groups, "use at most 65536"));
        }
        self.residual.validate()
    }
}

/// Grouped residual vector quantisation (Yang et al., "HiFi-Codec", 2023).
///
/// `z` is `[.., groups * group_dim]`, indices are `[.., groups, levels]`
/// (vector-quantize-pytorch puts the groups first). -1 and prefixes of the levels as in
/// [`ResidualVq`]. Parameters: `rvqs.{g}.*` as [`ResidualVq`].
#[derive(Debug)]
pub struct GroupedResidualVq {
    groups: Vec<ResidualVq>,
}

impl GroupedResidualVq {
    /// The quantiser that `config` describes, with parameters from `p`.
    ///
    /// # Errors
    /// [`Error::Config`] for a field out of range; when a file cannot be read.
    pub fn new(p: &ParamBuilder, config: &GroupedResidualVqConfig) -> Result<Self> {
        config.validate()?;
        let groups: Result<Vec<_>> = (0..config.groups)
            .map(|g| ResidualVq::new(&p.pp("rvqs").pp(g), &config.residual))
            .collect();
        Ok(Self { groups: groups? })
    }

    /// The quantisers of the groups.
    pub fn groups(&self) -> &[ResidualVq] {
        &self.groups
    }

    fn count(&self) -> i64 {
        self.groups.len() as i64
    }

    fn levels(&self) -> i64 {
        self.groups.first().map_or(0, |g| g.config().num_quantizers)
    }

    fn group_dim(&self) -> i64 {
        self.groups.first().map_or(0, Quantizer::dim)
    }

    /// As [`encode`](Quantizer::encode), with the first `levels` levels of every group.
    ///
    /// # Errors
    /// As [`encode`](Quantizer::encode); [`Error::Input`] when there are not that many.
    pub fn encode_levels(&self, z: &Tensor, levels: i64) -> Result<Encoded> {
        let rows = Rows::new(z, self.dim())?;
        let parts = rows.flat.f_split(self.group_dim(), -1)?;
        let (mut indices, mut vectors) = (Vec::new(), Vec::new());
        for (group, part) in self.groups.iter().zip(&parts) {
            let encoded = group.encode_levels(part, levels)?;
            indices.push(encoded.indices);
            vectors.push(encoded.quantized);
        }
        Ok(Encoded {
            indices: rows.restore(&Tensor::f_stack(&indices, 1)?)?,
            quantized: rows.vectors(&Tensor::f_cat(&vectors, -1)?)?,
        })
    }

    /// The indices `[.., levels]` of each group.
    fn split(&self, indices: &Tensor) -> Result<Vec<Tensor>> {
        let shape = if indices.defined() {
            indices.size()
        } else {
            Vec::new()
        };
        let (&[.., groups, levels], have) = (&shape[..], self.count()) else {
            return Err(no_level(0, self.levels()));
        };
        if groups != have {
            return Err(Error::Input(format!(
                "the indices have the shape {shape:?}: it must end in [{have}, {levels}]"
            )));
        }
        let part = |g| Ok(indices.f_select(-2, g)?);
        (0..have).map(part).collect()
    }
}

impl Quantizer for GroupedResidualVq {
    fn dim(&self) -> i64 {
        self.count() * self.group_dim()
    }

    fn codebook_size(&self) -> i64 {
        self.groups.first().map_or(0, Quantizer::codebook_size)
    }

    fn index_shape(&self) -> Vec<i64> {
        vec![self.count(), self.levels()]
    }

    fn encode(&self, z: &Tensor) -> Result<Encoded> {
        self.encode_levels(z, self.levels())
    }

    /// `[.., groups, levels, code_dim]`.
    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let parts = self.split(indices)?;
        let found: Result<Vec<Tensor>> = self
            .groups
            .iter()
            .zip(&parts)
            .map(|(group, part)| group.lookup(part))
            .collect();
        Ok(Tensor::f_stack(&found?, -3)?)
    }

    fn decode(&self, indices: &Tensor) -> Result<Tensor> {
        let parts = self.split(indices)?;
        let found: Result<Vec<Tensor>> = self
            .groups
            .iter()
            .zip(&parts)
            .map(|(group, part)| group.decode(part))
            .collect();
        Ok(Tensor::f_cat(&found?, -1)?)
    }

    /// The stages of the losses are group by group, level by level. Quantiser dropout leaves
    /// out the same levels of all groups.
    fn train(&mut self, z: &Tensor, key: Key) -> Result<Trained> {
        let rows = Rows::new(z, self.dim())?;
        let parts = rows.flat.f_split(self.group_dim(), -1)?;
        let kept = self.groups.first().map(|g| g.kept(z, key));
        let kept = kept.unwrap_or_default();
        let (mut indices, mut vectors) = (Vec::new(), Vec::new());
        let (mut stages, mut restarted) = (Vec::new(), 0);
        for ((group, part), g) in self.groups.iter_mut().zip(&parts).zip(0u64..) {
            let pass = group.pass(part, &kept, part_key(key, g))?;
            indices.push(pass.index);
            vectors.push(pass.output);
            stages.extend(pass.stages);
            restarted += pass.restarted;
        }
        let output = Tensor::f_cat(&vectors, -1)?;
        Ok(Trained {
            indices: rows.restore(&Tensor::f_stack(&indices, 1)?)?,
            quantized: rows.vectors(&output)?,
            loss: total(&stages, &output)?,
            stages,
            restarted,
        })
    }
}

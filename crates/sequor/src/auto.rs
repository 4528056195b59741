//! A pipeline from a folder, whatever is in it.

/// A loaded pipeline.
#[derive(Debug)]
#[non_exhaustive]
pub enum Pipeline {
    /// A language model.
    #[cfg(feature = "text")]
    Text(Box<sequor_text::TextPipeline>),
}

/// Loads what the folder or file holds, with default options.
///
/// # Errors
/// When it is no model that an enabled feature knows.
#[cfg(feature = "text")]
pub fn load(path: &std::path::Path) -> sequor_text::Result<Pipeline> {
    let pipeline = sequor_text::TextPipeline::load(path, &sequor_text::LoadOptions::default())?;
    Ok(Pipeline::Text(Box::new(pipeline)))
}

//! How fast GPUs compute: dense bfloat16 with tensor cores, by their data sheets.

/// The share of a GPU's best that a prefill reaches: 0.56 to 0.61 for Llama-3.1-8B on an H200 with prompts of 2,048 to 32,768
/// tokens (docs/performance.md). Larger models reach as much, mixtures of experts and several GPUs less.
pub(super) const PREFILL_SHARE: f64 = 0.6;

/// By name, in 10^12 operations a second.
const KNOWN: [(&str, f64); 16] = [
    ("a10", 125.0),
    ("a100", 312.0),
    ("a30", 165.0),
    ("a40", 149.7),
    ("b200", 2250.0),
    ("b300", 2250.0),
    ("gb200", 2500.0),
    ("gh200", 989.0),
    ("h100", 989.0),
    ("h100-nvl", 835.0),
    ("h100-pcie", 756.0),
    ("h200", 989.0),
    ("h20", 148.0),
    ("l4", 121.0),
    ("l40s", 362.0),
    ("rtx-4090", 165.2),
];

/// A GPU.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Gpu {
    pub(super) name: String,
    /// 10^12 operations a second.
    pub(super) teraflops: f64,
}

impl std::str::FromStr for Gpu {
    type Err = String;

    /// A name of the table, or a number of teraflops.
    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.trim().to_ascii_lowercase().replace([' ', '_'], "-");
        let known = KNOWN.iter().find(|(known, _)| *known == name).map(|(_, teraflops)| *teraflops);
        let given = name.parse().ok().filter(|teraflops: &f64| (1.0..=100_000.0).contains(teraflops));
        match known.or(given) {
            Some(teraflops) => Ok(Self { name, teraflops }),
            None => {
                let names: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).collect();
                Err(format!("give {}, or its dense bfloat16 teraflops", names.join(", ")))
            }
        }
    }
}

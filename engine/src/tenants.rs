//! Tenants: those on whose behalf an inference engine asks. Each has a namespace of its own beside that of the instance,
//! with the field `tenant` more: no lookup of one finds a block of another, whatever their keys are; memory and drive are
//! shared out between them as between namespaces; a tenant's blocks have a data key of their own in an encrypted store, and
//! can be purged alone.
//!
//! A namespace is made when a tenant saves for the first time, up to a bound. Tenants beyond it are put together into a few
//! common namespaces, always the same one for the same tenant; there only their keys tell them apart.

use std::fmt;
use std::sync::Arc;

use pegaflow_tiers::{Error, ErrorKind, GroupGeometry, NamespaceDescriptor, NamespaceHandle, Result};

use crate::drive_tier::DriveTier;

/// The field of a namespace's descriptor that names the tenant.
pub const TENANT_FIELD: &str = "tenant";
/// The longest name.
const NAME_BYTES_MAX: usize = 64;
/// Tenants with a namespace of their own, of all instances together.
pub(crate) const OWN_MAX: usize = 1024;
/// Namespaces that the others share.
const COMMON: u8 = 16;
/// Begins the names of those; no tenant's name has it.
const COMMON_MARK: char = '~';

/// A tenant's name: 1 to 64 letters, digits, `.`, `_` and `-` of ASCII.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(Arc<str>);

impl TenantId {
    /// Checks a name.
    ///
    /// # Errors
    /// `InvalidInput` if it is empty, longer than 64 bytes, or has other characters.
    pub fn new(name: &str) -> Result<Self> {
        let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_good) {
            let shown: String = name.chars().take(NAME_BYTES_MAX).collect();
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "'{shown}' ({} bytes) names no tenant; give 1 to {NAME_BYTES_MAX} of A-Z a-z 0-9 . _ -",
                    name.len()
                ),
            ));
        }
        Ok(Self(name.into()))
    }

    /// The tenant of requests with a cache salt: `salt-` and 32 hex digits of a digest, since a salt may be a secret.
    pub fn of_cache_salt(salt: &str) -> Self {
        let digest = NamespaceDescriptor::new().with("cache_salt", salt).id().to_string();
        Self(format!("salt-{digest:.32}").into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The common namespace that is this tenant's if it has none of its own.
    fn common(&self) -> String {
        let digest = NamespaceDescriptor::new().with(TENANT_FIELD, self.as_str()).id();
        let number = digest.as_bytes().first().copied().unwrap_or_default() % COMMON;
        format!("{COMMON_MARK}{number}")
    }

    /// The values of [`TENANT_FIELD`] under which blocks of this tenant can be: its own, and the common one.
    pub fn field_values(&self) -> [String; 2] {
        [self.0.to_string(), self.common()]
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a tenant's blocks are, if it has saved some, this time or in an earlier run.
pub(crate) fn existing(
    drive: &DriveTier,
    base: &NamespaceDescriptor,
    groups: &[GroupGeometry],
    tenant: &TenantId,
) -> Option<NamespaceHandle> {
    tenant.field_values().iter().find_map(|value| known(drive, &base.clone().with(TENANT_FIELD, value), groups))
}

/// Where a tenant's blocks go; makes the namespace if there is none, which writes to the drive.
///
/// # Errors
/// As [`DriveTier::namespace`].
pub(crate) fn existing_or_new(
    drive: &DriveTier,
    base: &NamespaceDescriptor,
    groups: &[GroupGeometry],
    tenant: &TenantId,
    own_max: usize,
) -> Result<NamespaceHandle> {
    let [own, common] = tenant.field_values().map(|value| base.clone().with(TENANT_FIELD, value));
    if let Some(handle) = known(drive, &own, groups) {
        return Ok(handle);
    }
    let has_room = drive.count_namespaces(&has_own) < own_max;
    drive.namespace(if has_room { &own } else { &common }, groups)
}

fn known(drive: &DriveTier, of: &NamespaceDescriptor, groups: &[GroupGeometry]) -> Option<NamespaceHandle> {
    let id = of.id();
    if let Some(handle) = drive.handle_of(&id) {
        return Some(handle);
    }
    // Of an earlier run: the store knows it, and writes nothing to hear of it again.
    drive.store()?.handle_of(&id)?;
    let handle = drive.namespace(of, groups);
    handle.inspect_err(|error| tracing::debug!(namespace = %id, %error, "a tenant's namespace cannot be used")).ok()
}

fn has_own(descriptor: &NamespaceDescriptor) -> bool {
    descriptor.fields().get(TENANT_FIELD).is_some_and(|value| !value.starts_with(COMMON_MARK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "salt-0123456789abcdef", "Team_7.eu", &"x".repeat(64)] {
            assert_eq!(
                TenantId::new(good).map(|it| it.to_string()).map_err(|error| error.to_string()),
                Ok(good.into())
            );
        }
        for bad in ["", "~3", "a b", "a/b", "ä", "a\n", &"x".repeat(65)] {
            let error = TenantId::new(bad).expect_err(bad);
            assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("64"), "{error}");
        }
    }

    #[test]
    fn a_salt_names_a_tenant_and_is_not_told() {
        let (one, other) = (TenantId::of_cache_salt("secret"), TenantId::of_cache_salt("secret "));
        assert_eq!(one.as_str(), "salt-f56e68e1b7f44482d4575f0c8200733f");
        assert!(one != other && TenantId::new(one.as_str()).is_ok());
    }

    #[test]
    fn a_common_namespace_is_nobodys_name_and_always_the_same() {
        let names: Vec<String> = (0..1000).map(|number| format!("t{number}")).collect();
        let common = |name: &String| TenantId::new(name).map(|tenant| tenant.common()).expect("a name");
        let used: std::collections::BTreeSet<String> = names.iter().map(common).collect();
        assert_eq!(used.len(), usize::from(COMMON));
        assert!(used.iter().all(|value| TenantId::new(value).is_err()));
        assert!(names.iter().all(|name| common(name) == common(name)));
    }
}

//! The versions of the specification.

use std::{fmt, str::FromStr};

use super::error::{CniError, ErrorCode};

/// A version of the CNI specification, ordered by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SpecVersion {
    /// 0.1.0: results carry one address per family; what a configuration
    /// without `cniVersion` means.
    V0_1_0,
    /// 0.2.0: adds VERSION.
    V0_2_0,
    /// 0.3.0: interfaces, lists of addresses, chains of plugins.
    V0_3_0,
    /// 0.3.1: as 0.3.0.
    V0_3_1,
    /// 0.4.0: adds CHECK, and `prevResult` for DEL.
    V0_4_0,
    /// 1.0.0: drops the `version` of an address.
    V1_0_0,
    /// 1.1.0: adds GC and STATUS, and more attributes of interfaces and routes.
    V1_1_0,
}

impl SpecVersion {
    /// Every version that the plugin speaks, oldest first.
    pub const SUPPORTED: [Self; 7] = [
        Self::V0_1_0,
        Self::V0_2_0,
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];

    /// The newest version that the plugin speaks.
    pub const LATEST: Self = Self::V1_1_0;

    /// The version as the specification writes it, such as `1.1.0`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// [`Self::SUPPORTED`] as text, for messages and the banner.
    pub fn supported_list() -> String {
        Self::SUPPORTED.map(Self::as_str).join(", ")
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SpecVersion {
    type Err = CniError;

    /// Accepts exactly the supported versions, and the empty string as 0.1.0.
    ///
    /// # Errors
    ///
    /// Code 1 for anything else.
    fn from_str(text: &str) -> Result<Self, CniError> {
        if text.is_empty() {
            return Ok(Self::V0_1_0);
        }
        Self::SUPPORTED
            .into_iter()
            .find(|version| version.as_str() == text)
            .ok_or_else(|| {
                CniError::new(
                    ErrorCode::IncompatibleVersion,
                    format!("incompatible CNI versions: cniVersion {text:?} is not supported"),
                )
                .with_details(format!("supported: {}", Self::supported_list()))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_orders_by_age() {
        for version in SpecVersion::SUPPORTED {
            assert_eq!(version.to_string().parse(), Ok(version));
        }
        assert!(SpecVersion::SUPPORTED.is_sorted());
        assert_eq!(SpecVersion::SUPPORTED.last(), Some(&SpecVersion::LATEST));
    }

    #[test]
    fn empty_is_the_first_version() {
        assert_eq!("".parse(), Ok(SpecVersion::V0_1_0));
    }

    #[test]
    fn only_exact_members_are_accepted() {
        for text in [
            "1.1",
            "1.2.0",
            "v1.0.0",
            " 1.0.0",
            "1.0.0-rc1",
            "0.3.2",
            "2.0.0",
        ] {
            let error = text.parse::<SpecVersion>().unwrap_err();
            assert_eq!(error.code, ErrorCode::IncompatibleVersion, "{text}");
            assert!(error.msg.contains(text), "{error}");
            assert!(error.details.contains("0.1.0, 0.2.0, 0.3.0"), "{error}");
        }
    }
}

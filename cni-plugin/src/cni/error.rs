//! The error that a verb answers with.

use std::fmt;

use serde_json::{Value, json};

use super::version::SpecVersion;

/// Why a verb failed, as a number (spec section 5, "Error").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// 1: the plugin does not speak the configuration's version, or that version
    /// does not know the verb.
    IncompatibleVersion,
    /// 2: a known key has a value that the plugin cannot serve; the message
    /// names both.
    UnsupportedField,
    /// 3: no such container; the runtime need not clean up.
    UnknownContainer,
    /// 4: a necessary environment variable is missing or invalid; the message
    /// names it.
    InvalidEnvironment,
    /// 5: input or output failed.
    Io,
    /// 6: the configuration (or a result) is not JSON of the right shape.
    Decode,
    /// 7: the network configuration is invalid.
    InvalidConfig,
    /// 8: `CNI_NETNS` is not a usable network namespace (libcni's own).
    InvalidNetns,
    /// 11: a transient condition; the runtime should try again.
    TryAgain,
    /// 50: STATUS: no ADD can succeed.
    NotAvailable,
    /// 51: STATUS: no ADD can succeed, and containers that are attached may have
    /// limited connectivity.
    LimitedConnectivity,
    /// 999: any other failure (libcni's own).
    Internal,
    /// Another number; from 100 on they are the plugin's own. Made by
    /// [`ErrorCode::from`], so never a number that has a name above.
    Other(u32),
}

impl From<u32> for ErrorCode {
    fn from(number: u32) -> Self {
        match number {
            1 => Self::IncompatibleVersion,
            2 => Self::UnsupportedField,
            3 => Self::UnknownContainer,
            4 => Self::InvalidEnvironment,
            5 => Self::Io,
            6 => Self::Decode,
            7 => Self::InvalidConfig,
            8 => Self::InvalidNetns,
            11 => Self::TryAgain,
            50 => Self::NotAvailable,
            51 => Self::LimitedConnectivity,
            999 => Self::Internal,
            other => Self::Other(other),
        }
    }
}

impl From<ErrorCode> for u32 {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::IncompatibleVersion => 1,
            ErrorCode::UnsupportedField => 2,
            ErrorCode::UnknownContainer => 3,
            ErrorCode::InvalidEnvironment => 4,
            ErrorCode::Io => 5,
            ErrorCode::Decode => 6,
            ErrorCode::InvalidConfig => 7,
            ErrorCode::InvalidNetns => 8,
            ErrorCode::TryAgain => 11,
            ErrorCode::NotAvailable => 50,
            ErrorCode::LimitedConnectivity => 51,
            ErrorCode::Internal => 999,
            ErrorCode::Other(number) => number,
        }
    }
}

/// What a failed verb tells the runtime.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct CniError {
    /// The kind of failure.
    pub code: ErrorCode,
    /// One line: what was being done, what is wrong, what would be right.
    pub msg: String,
    /// More for the reader of a log; may be empty.
    pub details: String,
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        if !self.details.is_empty() {
            write!(f, ": {}", self.details)?;
        }
        Ok(())
    }
}

impl CniError {
    /// An error of the given kind, without details.
    pub fn new(code: ErrorCode, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// Code 7: `key` of the configuration holds `value`, where `expected` is
    /// wanted ("a whole number from 68 to 65535").
    pub fn invalid_config(
        key: &str,
        value: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        Self::new(
            ErrorCode::InvalidConfig,
            format!("invalid network configuration: {key} is {value}, must be {expected}"),
        )
    }

    /// Code 7: `key` is missing from the configuration.
    pub fn missing_config(key: &str, expected: impl fmt::Display) -> Self {
        Self::new(
            ErrorCode::InvalidConfig,
            format!("invalid network configuration: {key} is missing, must be {expected}"),
        )
    }

    /// Code 2: `key` is known, but what `value` asks for is not built.
    pub fn unsupported(key: &str, value: impl fmt::Display, supported: impl fmt::Display) -> Self {
        Self::new(
            ErrorCode::UnsupportedField,
            format!(
                "unsupported network configuration: {key} is {value}; supported is {supported}"
            ),
        )
    }

    /// Code 4: the environment variable `name` holds `value`, where `expected`
    /// is wanted.
    pub fn invalid_env(name: &str, value: impl fmt::Debug, expected: impl fmt::Display) -> Self {
        Self::new(
            ErrorCode::InvalidEnvironment,
            format!("invalid environment: {name} is {value:?}, must be {expected}"),
        )
    }

    /// Code 6: `what` cannot be decoded.
    pub fn decode(what: impl fmt::Display, error: impl fmt::Display) -> Self {
        Self::new(ErrorCode::Decode, format!("decoding {what}: {error}"))
    }

    /// Code 5: reading or writing failed while `doing` ("reading stdin").
    pub fn io(doing: impl fmt::Display, error: impl fmt::Display) -> Self {
        Self::new(ErrorCode::Io, format!("{doing}: {error}"))
    }

    /// Code 999: a failure that has no code of its own.
    pub fn internal(msg: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, msg)
    }

    /// The same error with `details` for the log.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// The same error, its message led by what was being done.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.msg = format!("{doing}: {}", self.msg);
        self
    }

    /// The error as the specification's JSON object.
    pub fn to_json(&self, version: SpecVersion) -> Value {
        let mut object = json!({
            "cniVersion": version.as_str(),
            "code": u32::from(self.code),
            "msg": self.msg,
        });
        if !self.details.is_empty() {
            object["details"] = self.details.as_str().into();
        }
        object
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_specifications() {
        let named = [
            (ErrorCode::IncompatibleVersion, 1),
            (ErrorCode::UnsupportedField, 2),
            (ErrorCode::UnknownContainer, 3),
            (ErrorCode::InvalidEnvironment, 4),
            (ErrorCode::Io, 5),
            (ErrorCode::Decode, 6),
            (ErrorCode::InvalidConfig, 7),
            (ErrorCode::InvalidNetns, 8),
            (ErrorCode::TryAgain, 11),
            (ErrorCode::NotAvailable, 50),
            (ErrorCode::LimitedConnectivity, 51),
            (ErrorCode::Internal, 999),
            (ErrorCode::Other(142), 142),
        ];
        for (code, number) in named {
            assert_eq!(u32::from(code), number);
            assert_eq!(ErrorCode::from(number), code);
        }
    }

    #[test]
    fn json_has_the_specified_keys() {
        let error = CniError::invalid_config("mtu", 5, "a whole number from 68 to 65535");
        assert_eq!(
            error.to_json(SpecVersion::V0_4_0),
            json!({
                "cniVersion": "0.4.0",
                "code": 7,
                "msg": "invalid network configuration: mtu is 5, must be a whole number from 68 to 65535",
            })
        );
        let detailed = error.with_details("more").context("adding eth0");
        let json = detailed.to_json(SpecVersion::LATEST);
        assert_eq!(json["details"], "more");
        assert_eq!(json["cniVersion"], "1.1.0");
        assert!(detailed.to_string().starts_with("adding eth0: invalid"));
    }
}

//! Reading JSON as Go's `encoding/json` does.
//!
//! Runtimes and stock plugins are written in Go, whose decoder matches keys
//! without regard to case: containerd sends `HostPort` for `hostPort`. It also
//! lets a later key win over an earlier one of the same name, and takes `null`
//! for an absent key.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

use super::error::CniError;

/// How much of an offending value an error shows, in characters.
const SHOWN_VALUE_MAX: usize = 80;

/// Decodes JSON text. Of the keys of an object that differ in case only, the
/// last one is kept.
///
/// # Errors
///
/// The position and nature of what is not JSON.
pub fn decode(text: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice(text).map(|Folded(value)| value)
}

/// A character as Go's decoder compares it. Of the characters that are not
/// ASCII only two fold to ASCII, and all known keys are ASCII.
fn fold_char(c: char) -> char {
    match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    }
}

fn fold(key: &str) -> String {
    key.chars().map(fold_char).collect()
}

/// Whether two keys are the same to Go's decoder.
pub fn same_key(a: &str, b: &str) -> bool {
    a == b || a.chars().map(fold_char).eq(b.chars().map(fold_char))
}

/// A value whose objects have no two keys that differ in case only.
struct Folded(Value);

impl<'de> Deserialize<'de> for Folded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FoldedVisitor)
    }
}

struct FoldedVisitor;

impl<'de> Visitor<'de> for FoldedVisitor {
    type Value = Folded;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Folded, E> {
        Ok(Folded(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Folded, E> {
        Ok(Folded(Value::Bool(value)))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Folded, E> {
        Ok(Folded(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Folded, E> {
        Ok(Folded(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Folded, E> {
        Ok(Folded(
            Number::from_f64(value).map_or(Value::Null, Value::Number),
        ))
    }

    fn visit_str<E>(self, value: &str) -> Result<Folded, E> {
        Ok(Folded(value.into()))
    }

    fn visit_string<E>(self, value: String) -> Result<Folded, E> {
        Ok(Folded(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Folded, A::Error> {
        let mut values = Vec::new();
        while let Some(Folded(value)) = seq.next_element()? {
            values.push(value);
        }
        Ok(Folded(Value::Array(values)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Folded, A::Error> {
        let mut by_fold = BTreeMap::new();
        while let Some((key, Folded(value))) = entries.next_entry::<String, Folded>()? {
            by_fold.insert(fold(&key), (key, value));
        }
        Ok(Folded(Value::Object(by_fold.into_values().collect())))
    }
}

/// A value as an error shows it: compact JSON, cut when long.
pub fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_VALUE_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// A JSON object (or the absence of one) at a known place of a document, whose
/// known keys are read by type. An error is [`CniError::invalid_config`], with
/// the key's whole path.
#[derive(Clone, Debug)]
pub struct Object<'a> {
    map: Option<&'a Map<String, Value>>,
    path: String,
}

impl<'a> Object<'a> {
    /// The object that `value` is. `path` leads the names of its keys in errors
    /// and may be empty. `null` is an empty object.
    ///
    /// # Errors
    ///
    /// `value` is something else.
    pub fn new(value: &'a Value, path: &str) -> Result<Self, CniError> {
        let map = match value {
            Value::Object(map) => Some(map),
            Value::Null => None,
            other => {
                let place = if path.is_empty() {
                    "the document"
                } else {
                    path
                };
                return Err(CniError::invalid_config(place, shown(other), "an object"));
            }
        };
        Ok(Self {
            map,
            path: path.to_owned(),
        })
    }

    /// The path of `key`, as errors name it.
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    /// Whether `key` is there, be it `null`.
    pub fn has(&self, key: &str) -> bool {
        self.map
            .is_some_and(|map| map.keys().any(|k| same_key(k, key)))
    }

    /// The value of `key`; `None` if it is absent or `null`.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        let map = self.map?;
        map.get(key)
            .or_else(|| map.iter().find(|(k, _)| same_key(k, key)).map(|(_, v)| v))
            .filter(|value| !value.is_null())
    }

    /// The entries whose keys are none of `known`.
    pub fn unknown(&self, known: &[&str]) -> Map<String, Value> {
        self.map
            .into_iter()
            .flatten()
            .filter(|(key, _)| !known.iter().any(|known| same_key(known, key)))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    fn read<T>(
        &self,
        key: &str,
        expected: impl fmt::Display,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CniError> {
        self.get(key)
            .map(|value| read(value).ok_or_else(|| self.invalid(key, value, expected)))
            .transpose()
    }

    /// The error that `key` holds `value` where `expected` is wanted.
    pub fn invalid(&self, key: &str, value: &Value, expected: impl fmt::Display) -> CniError {
        CniError::invalid_config(&self.path(key), shown(value), expected)
    }

    /// A boolean.
    ///
    /// # Errors
    ///
    /// `key` holds something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, CniError> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// A string.
    ///
    /// # Errors
    ///
    /// `key` holds something else.
    pub fn str(&self, key: &str) -> Result<Option<&'a str>, CniError> {
        self.read(key, "a string", Value::as_str)
    }

    /// A string; the empty one counts as absent, as with Go's `omitempty`.
    ///
    /// # Errors
    ///
    /// `key` holds something else.
    pub fn non_empty(&self, key: &str) -> Result<Option<&'a str>, CniError> {
        Ok(self.str(key)?.filter(|text| !text.is_empty()))
    }

    /// A whole number within `range`.
    ///
    /// # Errors
    ///
    /// `key` holds something else.
    pub fn int<T: TryFrom<i64>>(
        &self,
        key: &str,
        range: std::ops::RangeInclusive<i64>,
    ) -> Result<Option<T>, CniError> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.read(key, expected, |value| {
            let number = value.as_i64().filter(|number| range.contains(number))?;
            T::try_from(number).ok()
        })
    }

    /// What a non-empty string parses to; `expected` says what it must be.
    ///
    /// # Errors
    ///
    /// `key` holds something else.
    pub fn parsed<T: FromStr>(
        &self,
        key: &str,
        expected: impl fmt::Display,
    ) -> Result<Option<T>, CniError> {
        match self.get(key) {
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            _ => self.read(key, expected, |value| value.as_str()?.parse().ok()),
        }
    }

    /// An object; an absent one is empty.
    ///
    /// # Errors
    ///
    /// `key` holds something else.
    pub fn object(&self, key: &str) -> Result<Self, CniError> {
        Object::new(self.get(key).unwrap_or(&Value::Null), &self.path(key))
    }

    /// An array; an absent one is empty.
    ///
    /// # Errors
    ///
    /// `key` holds something else.
    pub fn array(&self, key: &str) -> Result<&'a [Value], CniError> {
        let array = self.read(key, "an array", |value| value.as_array())?;
        Ok(array.map_or(&[], Vec::as_slice))
    }

    /// An array of objects; an absent one is empty.
    ///
    /// # Errors
    ///
    /// `key` holds something else.
    pub fn objects(&self, key: &str) -> Result<Vec<Self>, CniError> {
        let path = self.path(key);
        let objects = self.array(key)?.iter().enumerate();
        objects
            .map(|(index, value)| Object::new(value, &format!("{path}[{index}]")))
            .collect()
    }

    /// An array of strings, each parsed; an absent array is empty. `expected`
    /// says what one element must be.
    ///
    /// # Errors
    ///
    /// `key` holds something else.
    pub fn list<T: FromStr>(
        &self,
        key: &str,
        expected: impl fmt::Display,
    ) -> Result<Vec<T>, CniError> {
        let elements = self.array(key)?.iter().enumerate();
        elements
            .map(|(index, value)| {
                let parsed = value.as_str().and_then(|text| text.parse().ok());
                parsed.ok_or_else(|| {
                    let path = format!("{}[{index}]", self.path(key));
                    CniError::invalid_config(&path, shown(value), &expected)
                })
            })
            .collect()
    }
}

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

    /// What `read` makes of the value of `key`; `expected` says what it must be.
    ///
    /// # Errors
    ///
    /// `read` made nothing of it.
    pub fn read<T>(
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::cni::error::ErrorCode;

    fn value(text: &str) -> Value {
        decode(text.as_bytes()).unwrap()
    }

    #[test]
    fn the_last_of_keys_that_differ_in_case_wins() {
        for (text, expected) in [
            (r#"{"mtu":1,"MTU":2}"#, 2),
            (r#"{"MTU":2,"mtu":1}"#, 1),
            (r#"{"mtu":1,"Mtu":2,"mtu":3}"#, 3),
            (r#"{"mtu":1,"MTU":2,"a":{"mtu":9}}"#, 2),
        ] {
            let value = value(text);
            let object = Object::new(&value, "").unwrap();
            assert_eq!(object.int("mtu", 0..=9), Ok(Some(expected)), "{text}");
        }
    }

    #[test]
    fn keys_fold_as_in_go() {
        assert!(same_key("isGateway", "ISGATEWAY"));
        assert!(same_key("macspoofchk", "mac\u{17f}poofch\u{212a}"));
        assert!(!same_key("mtu", "mtü"));
        assert!(!same_key("mtu", "mt"));
        let value = json!({ "is\u{17f}ue": 1 });
        let object = Object::new(&value, "").unwrap();
        assert_eq!(object.int("issue", 0..=1), Ok(Some(1)));
    }

    #[test]
    fn everything_else_is_kept_as_it_is() {
        let text =
            r#"{"a":[1,-2,2.5,null,true,"x",{"B":{}}],"é":"\u0000","n":18446744073709551615}"#;
        assert_eq!(value(text), serde_json::from_str::<Value>(text).unwrap());
        let last_digit = "1.4011111111111108e120";
        assert_eq!(value(last_digit).as_f64(), last_digit.parse().ok());
    }

    #[test]
    fn what_is_no_json_is_an_error() {
        let deep = "[".repeat(100_000);
        for text in ["", "{", "{}x", "{\"a\"}", "nul", "\u{feff}{}", &deep] {
            assert!(decode(text.as_bytes()).is_err());
        }
        assert!(decode(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn errors_name_path_value_and_expectation() {
        let value = json!({ "A": { "list": ["x", 5], "n": 1.5, "s": [1], "o": "text" } });
        let root = Object::new(&value, "").unwrap();
        let a = root.object("a").unwrap();
        let cases = [
            (
                a.list::<String>("list", "a string").map(drop),
                "a.list[1] is 5, must be a string",
            ),
            (
                a.int::<u8>("n", 0..=9).map(drop),
                "a.n is 1.5, must be a whole number from 0 to 9",
            ),
            (a.str("s").map(drop), "a.s is [1], must be a string"),
            (
                a.bool("o").map(drop),
                "a.o is \"text\", must be true or false",
            ),
            (
                a.object("o").map(drop),
                "a.o is \"text\", must be an object",
            ),
            (a.array("o").map(drop), "a.o is \"text\", must be an array"),
            (
                a.objects("list").map(drop),
                "a.list[0] is \"x\", must be an object",
            ),
            (
                a.parsed::<u8>("s", "a byte").map(drop),
                "a.s is [1], must be a byte",
            ),
        ];
        for (read, message) in cases {
            let error = read.unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidConfig);
            assert!(error.msg.ends_with(message), "{error}");
        }
    }

    #[test]
    fn null_and_absence_are_the_same() {
        let value = json!({ "n": null, "empty": "" });
        let object = Object::new(&value, "").unwrap();
        for key in ["n", "absent"] {
            assert_eq!(object.bool(key), Ok(None));
            assert_eq!(object.str(key), Ok(None));
            assert_eq!(object.int::<u8>(key, 0..=1), Ok(None));
            assert_eq!(object.array(key), Ok(&[][..]));
            assert!(object.object(key).unwrap().get("x").is_none());
        }
        assert!(object.has("N"));
        assert!(!object.has("absent"));
        assert_eq!(object.str("empty"), Ok(Some("")));
        assert_eq!(object.non_empty("empty"), Ok(None));
        assert_eq!(object.parsed::<u8>("empty", "a byte"), Ok(None));
    }

    #[test]
    fn long_values_are_cut_in_errors() {
        let value = Value::from("é".repeat(1000));
        let text = shown(&value);
        assert_eq!(text.chars().count(), SHOWN_VALUE_MAX + 3);
    }

    /// `key` with the case of each letter as `upper` says.
    fn recased(key: &str, upper: &[bool]) -> String {
        key.chars()
            .zip(upper.iter().cycle())
            .map(|(c, upper)| {
                if *upper {
                    c.to_ascii_uppercase()
                } else {
                    c.to_ascii_lowercase()
                }
            })
            .collect()
    }

    proptest! {
        #[test]
        fn any_case_of_a_key_reads_the_same(
            key in "[a-zA-Z]{1,20}",
            upper in prop::collection::vec(any::<bool>(), 1..20),
            number in 0..100_u8,
        ) {
            let text = format!(r#"{{"{}":{number}}}"#, recased(&key, &upper));
            let value = value(&text);
            let object = Object::new(&value, "").unwrap();
            prop_assert_eq!(object.int(&key, 0..=100), Ok(Some(number)));
            prop_assert!(object.unknown(&[&key]).is_empty());
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(&bytes);
        }
    }
}

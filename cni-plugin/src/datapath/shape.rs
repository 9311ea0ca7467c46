//! What a map is like: its kind, its sizes, and the fields of its keys and values, as the
//! type information (BTF) names them. And how an entry of one shape becomes one of another:
//! field by field, by name.
//!
//! The kernel keeps the type information of every map that is made here, so a map that an
//! older version has made says itself what is in it.

use std::{fmt, ops::Range};

use thiserror::Error;

/// What a map is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Its name, of which the kernel keeps 15 bytes.
    pub(super) name: String,
    /// `BPF_MAP_TYPE_*`.
    pub(super) kind: u32,
    /// The length of a key in bytes.
    pub(super) key_size: u32,
    /// The length of a value in bytes.
    pub(super) value_size: u32,
    /// How many entries it can have.
    pub(super) max_entries: u32,
    /// `BPF_F_*`.
    pub(super) flags: u32,
    /// What a key is, if that is known.
    pub(super) key: Option<Type>,
    /// What a value is.
    pub(super) value: Option<Type>,
}

impl Shape {
    /// What differs from `other` besides the number of entries, in words; `None` if nothing
    /// does.
    pub(super) fn differs_from(&self, other: &Self) -> Option<(String, String)> {
        let words = |what: &str, own: &dyn fmt::Display, other: &dyn fmt::Display| {
            Some((format!("{what} {own}"), format!("{what} {other}")))
        };
        let typed = |own: &Option<Type>, other: &Option<Type>| match (own, other) {
            (Some(own), Some(other)) if own != other => Some((own.clone(), other.clone())),
            _ => None,
        };
        if self.name != other.name {
            words("a map of the name", &self.name, &other.name)
        } else if self.kind != other.kind {
            words("a map of the kind", &self.kind, &other.kind)
        } else if self.key_size != other.key_size {
            words(
                "a map whose keys have bytes:",
                &self.key_size,
                &other.key_size,
            )
        } else if self.value_size != other.value_size {
            words(
                "a map whose values have bytes:",
                &self.value_size,
                &other.value_size,
            )
        } else if self.flags != other.flags {
            words("a map with the flags", &self.flags, &other.flags)
        } else if let Some((own, other)) = typed(&self.key, &other.key) {
            words("a map whose keys are", &own, &other)
        } else if let Some((own, other)) = typed(&self.value, &other.value) {
            words("a map whose values are", &own, &other)
        } else {
            None
        }
    }
}

/// A type as it lies in memory. The names of types do not count, those of fields do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Integer { size: usize, signed: bool },
    Array { element: Box<Self>, count: usize },
    Struct { size: usize, fields: Vec<Field> },
}

/// A field of a struct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    name: String,
    /// In bytes.
    offset: usize,
    is: Type,
}

impl Type {
    /// Where a field of a struct is.
    pub(super) fn field(&self, name: &str) -> Option<Range<usize>> {
        let Self::Struct { fields, .. } = self else {
            return None;
        };
        let field = fields.iter().find(|field| field.name == name)?;
        Some(field.offset..field.offset + field.is.size())
    }

    const fn size(&self) -> usize {
        match self {
            Self::Integer { size, .. } | Self::Struct { size, .. } => *size,
            Self::Array { element, count } => element.size() * *count,
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer { size, signed } => {
                write!(f, "{}{}", if *signed { 'i' } else { 'u' }, size * 8)
            }
            Self::Array { element, count } => write!(f, "[{element}; {count}]"),
            Self::Struct { fields, .. } => {
                f.write_str("{")?;
                for (number, field) in fields.iter().enumerate() {
                    let separator = if number == 0 { "" } else { ", " };
                    write!(f, "{separator}{}: {}", field.name, field.is)?;
                }
                f.write_str("}")
            }
        }
    }
}

/// Why an entry cannot be carried over.
#[derive(Debug, Error)]
pub(super) enum Misfit {
    /// Nobody knows what is in it.
    #[error("the kernel has no type information of it")]
    Untyped,
    /// The types have nothing in common.
    #[error("the field {field:?} was {from}, and is {to} now")]
    Types {
        field: String,
        from: String,
        to: String,
    },
    /// A number is too large for what it is to be.
    #[error("{value} in the field {field:?} does not fit into {size} bytes")]
    Number {
        field: String,
        value: u64,
        size: usize,
    },
    /// Something would be cut off.
    #[error("the field {field:?} has more than its new length")]
    Length { field: String },
}

/// One step of a conversion; places are offsets in bytes.
#[derive(Debug)]
enum Step {
    Copy {
        from: usize,
        to: usize,
        len: usize,
    },
    Resize {
        from: (usize, usize),
        to: (usize, usize),
        signed: bool,
        field: String,
    },
    /// What has no place any more must be zero.
    Drop {
        from: usize,
        len: usize,
        field: String,
    },
}

/// How values of one type become those of another: fields of the same name are the same,
/// new ones are zero, those that are gone are forgotten.
#[derive(Debug)]
pub(super) struct Conversion {
    steps: Vec<Step>,
    size: usize,
}

impl Conversion {
    pub(super) fn new(from: &Type, to: &Type) -> Result<Self, Misfit> {
        let mut steps = Vec::new();
        plan(&mut steps, "", (from, 0), (to, 0))?;
        Ok(Self {
            steps,
            size: to.size(),
        })
    }

    /// The new value for an old one.
    pub(super) fn apply(&self, old: &[u8]) -> Result<Vec<u8>, Misfit> {
        let mut new = vec![0; self.size];
        for step in &self.steps {
            match step {
                Step::Copy { from, to, len } => {
                    new[*to..to + len].copy_from_slice(&old[*from..from + len]);
                }
                Step::Resize {
                    from: (from, from_size),
                    to: (to, to_size),
                    signed,
                    field,
                } => {
                    let number = read(&old[*from..from + from_size], *signed);
                    write(number, *signed, &mut new[*to..to + to_size]).ok_or_else(|| {
                        Misfit::Number {
                            field: field.clone(),
                            value: number,
                            size: *to_size,
                        }
                    })?;
                }
                Step::Drop { from, len, field } => {
                    if old[*from..from + len].iter().any(|byte| *byte != 0) {
                        return Err(Misfit::Length {
                            field: field.clone(),
                        });
                    }
                }
            }
        }
        Ok(new)
    }
}

fn plan(
    steps: &mut Vec<Step>,
    field: &str,
    (from, from_at): (&Type, usize),
    (to, to_at): (&Type, usize),
) -> Result<(), Misfit> {
    match (from, to) {
        (from, to) if from == to => steps.push(Step::Copy {
            from: from_at,
            to: to_at,
            len: to.size(),
        }),
        (
            Type::Integer { size, signed },
            Type::Integer {
                size: to_size,
                signed: to_signed,
            },
        ) if signed == to_signed => steps.push(Step::Resize {
            from: (from_at, *size),
            to: (to_at, *to_size),
            signed: *signed,
            field: field.to_owned(),
        }),
        (
            Type::Array { element, count },
            Type::Array {
                element: to_element,
                count: to_count,
            },
        ) => {
            for index in 0..*count.min(to_count) {
                let from = (element.as_ref(), from_at + index * element.size());
                let to = (to_element.as_ref(), to_at + index * to_element.size());
                plan(steps, field, from, to)?;
            }
            if count > to_count {
                steps.push(Step::Drop {
                    from: from_at + to_count * element.size(),
                    len: (count - to_count) * element.size(),
                    field: field.to_owned(),
                });
            }
        }
        (
            Type::Struct { fields, .. },
            Type::Struct {
                fields: to_fields, ..
            },
        ) => {
            for to in to_fields {
                let Some(from) = fields.iter().find(|from| from.name == to.name) else {
                    continue;
                };
                let dot = if field.is_empty() { "" } else { "." };
                plan(
                    steps,
                    &format!("{field}{dot}{}", to.name),
                    (&from.is, from_at + from.offset),
                    (&to.is, to_at + to.offset),
                )?;
            }
        }
        (from, to) => {
            return Err(Misfit::Types {
                field: field.to_owned(),
                from: from.to_string(),
                to: to.to_string(),
            });
        }
    }
    Ok(())
}

/// A number of up to 8 bytes.
pub(super) fn number(bytes: &[u8]) -> u64 {
    read(bytes, false)
}

/// A number of up to 8 bytes, extended to all of them.
fn read(bytes: &[u8], signed: bool) -> u64 {
    let negative = signed
        && match cfg!(target_endian = "big") {
            true => bytes.first(),
            false => bytes.last(),
        }
        .is_some_and(|byte| byte & 0x80 != 0);
    let mut all = [if negative { 0xff } else { 0 }; 8];
    let len = bytes.len().min(8);
    if cfg!(target_endian = "big") {
        all[8 - len..].copy_from_slice(&bytes[..len]);
    } else {
        all[..len].copy_from_slice(&bytes[..len]);
    }
    u64::from_ne_bytes(all)
}

/// Writes the lower bytes of a number, if they are all that it has.
fn write(number: u64, signed: bool, to: &mut [u8]) -> Option<()> {
    let all = number.to_ne_bytes();
    let len = to.len().min(8);
    if cfg!(target_endian = "big") {
        to[..len].copy_from_slice(&all[8 - len..]);
    } else {
        to[..len].copy_from_slice(&all[..len]);
    }
    (read(to, signed) == number).then_some(())
}

/// Type information (`Documentation/bpf/btf.rst` of the kernel's source).
pub(super) struct Btf<'a> {
    types: Vec<Record<'a>>,
    strings: &'a [u8],
}

/// A type as it is written down: `struct btf_type`, and what follows it.
struct Record<'a> {
    kind: u32,
    /// Whether the offsets of a struct's fields have a size of bits in them.
    bits: bool,
    /// The size or, of what stands for another type, that type.
    is: u32,
    rest: &'a [u8],
}

/// The first two bytes (`BTF_MAGIC`).
const MAGIC: u16 = 0xeb9f;
/// How deep types may be in each other.
const DEPTH: u32 = 16;

impl<'a> Btf<'a> {
    /// Reads it; `None` if it is malformed.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let magic = u16::from_ne_bytes(*bytes.first_chunk()?);
        if magic != MAGIC {
            return None;
        }
        let header = |at| word(bytes, at);
        let body = bytes.get(header(4)?..)?;
        let section = |at: usize| {
            let (offset, len) = (header(at)?, header(at + 4)?);
            body.get(offset..)?.get(..len)
        };
        let (mut left, strings) = (section(8)?, section(16)?);
        // Type 0 is void.
        let mut types = vec![Record {
            kind: 0,
            bits: false,
            is: 0,
            rest: &[],
        }];
        while !left.is_empty() {
            let (info, is) = (word(left, 4)?, word(left, 8)?);
            let (count, kind) = (info & 0xffff, info >> 24 & 0x1f);
            let len = match kind {
                INTEGER | VARIABLE | DECLARATION_TAG => 4,
                ARRAY => 12,
                STRUCT | UNION | SECTION | ENUM64 => 12 * count,
                ENUM | FUNCTION_TYPE => 8 * count,
                _ => 0,
            };
            let rest = left.get(12..)?.get(..len)?;
            left = left.get(12 + len..)?;
            types.push(Record {
                kind: u32::try_from(kind).ok()?,
                bits: info >> 31 != 0,
                is: u32::try_from(is).ok()?,
                rest,
            });
        }
        Some(Self { types, strings })
    }

    /// The type of this number; `None` if keys and values have no such types.
    pub(super) fn describe(&self, number: u32) -> Option<Type> {
        self.describe_at(number, DEPTH)
    }

    fn describe_at(&self, number: u32, depth: u32) -> Option<Type> {
        let depth = depth.checked_sub(1)?;
        let record = self.types.get(usize::try_from(number).ok()?)?;
        let size = usize::try_from(record.is).ok()?;
        match record.kind as usize {
            INTEGER => Some(Type::Integer {
                size,
                signed: word(record.rest, 0)? >> 24 & SIGNED != 0,
            }),
            ENUM | ENUM64 => Some(Type::Integer {
                size,
                signed: false,
            }),
            ARRAY => Some(Type::Array {
                element: Box::new(self.describe_at(number_at(record.rest, 0)?, depth)?),
                count: word(record.rest, 8)?,
            }),
            STRUCT if !record.bits => {
                let fields = record.rest.chunks(12).map(|field| {
                    Some(Field {
                        name: self.text(number_at(field, 0)?)?,
                        offset: word(field, 8)? / 8,
                        is: self.describe_at(number_at(field, 4)?, depth)?,
                    })
                });
                Some(Type::Struct {
                    size,
                    fields: fields.collect::<Option<_>>()?,
                })
            }
            TYPEDEF | VOLATILE | CONST | TYPE_TAG => self.describe_at(record.is, depth),
            _ => None,
        }
    }

    fn text(&self, offset: u32) -> Option<String> {
        let bytes = self.strings.get(usize::try_from(offset).ok()?..)?;
        let end = bytes.iter().position(|byte| *byte == 0)?;
        Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }
}

/// `BTF_KIND_*`.
const INTEGER: usize = 1;
const ARRAY: usize = 3;
const STRUCT: usize = 4;
const UNION: usize = 5;
const ENUM: usize = 6;
const TYPEDEF: usize = 8;
const VOLATILE: usize = 9;
const CONST: usize = 10;
const FUNCTION_TYPE: usize = 13;
const VARIABLE: usize = 14;
const SECTION: usize = 15;
const DECLARATION_TAG: usize = 17;
const TYPE_TAG: usize = 18;
const ENUM64: usize = 19;
/// `BTF_INT_SIGNED`.
const SIGNED: usize = 1;

fn number_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(number_at(bytes, at)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const U8: Type = Type::Integer {
        size: 1,
        signed: false,
    };
    const U16: Type = Type::Integer {
        size: 2,
        signed: false,
    };
    const U32: Type = Type::Integer {
        size: 4,
        signed: false,
    };
    const U64: Type = Type::Integer {
        size: 8,
        signed: false,
    };

    fn array(element: Type, count: usize) -> Type {
        Type::Array {
            element: Box::new(element),
            count,
        }
    }

    /// A struct whose fields follow each other.
    fn structure<const N: usize>(fields: [(&str, Type); N]) -> Type {
        let mut size = 0;
        let fields = fields.map(|(name, is)| {
            let offset = size;
            size += is.size();
            Field {
                name: name.to_owned(),
                offset,
                is,
            }
        });
        Type::Struct {
            size,
            fields: fields.into(),
        }
    }

    fn convert(from: &Type, to: &Type, old: &[u8]) -> Result<Vec<u8>, Misfit> {
        Conversion::new(from, to)?.apply(old)
    }

    #[test]
    fn fields_are_found_by_their_names() {
        let from = structure([("mac", array(U8, 3)), ("gone", U8), ("port", U16)]);
        let to = structure([("new", U32), ("port", U32), ("mac", array(U8, 3))]);
        let old = [1, 2, 3, 9, 0x34, 0x12];
        let new = convert(&from, &to, &old).unwrap();
        assert_eq!(new, [0, 0, 0, 0, 0x34, 0x12, 0, 0, 1, 2, 3]);
        // And back: what is gone is zero.
        assert_eq!(convert(&to, &from, &new).unwrap(), [1, 2, 3, 0, 0x34, 0x12]);
    }

    #[test]
    fn structs_in_arrays_in_structs_are_converted() {
        let from = structure([("all", array(structure([("a", U8), ("b", U8)]), 2))]);
        let to = structure([("all", array(structure([("b", U16), ("a", U8)]), 3))]);
        assert_eq!(
            convert(&from, &to, &[1, 2, 3, 4]).unwrap(),
            [2, 0, 1, 4, 0, 3, 0, 0, 0]
        );
    }

    #[test]
    fn numbers_keep_their_worth_or_are_refused() {
        assert_eq!(
            convert(&U64, &U16, &513_u64.to_ne_bytes()).unwrap(),
            513_u16.to_ne_bytes()
        );
        let error = convert(
            &structure([("limit", U32)]),
            &structure([("limit", U16)]),
            &65_536_u32.to_ne_bytes(),
        );
        let words = error.unwrap_err().to_string();
        assert_eq!(
            words,
            "65536 in the field \"limit\" does not fit into 2 bytes"
        );
        let signed = |size| Type::Integer { size, signed: true };
        assert_eq!(
            convert(&signed(2), &signed(4), &(-2_i16).to_ne_bytes()).unwrap(),
            (-2_i32).to_ne_bytes()
        );
        convert(&signed(4), &signed(2), &(-70_000_i32).to_ne_bytes()).unwrap_err();
    }

    #[test]
    fn what_is_cut_off_must_be_zero() {
        let (long, short) = (array(U8, 4), array(U8, 2));
        assert_eq!(convert(&long, &short, &[1, 2, 0, 0]).unwrap(), [1, 2]);
        convert(&long, &short, &[1, 2, 0, 3]).unwrap_err();
    }

    #[test]
    fn what_has_nothing_in_common_is_refused() {
        let words = convert(
            &structure([("a", U8)]),
            &structure([("a", array(U8, 2))]),
            &[1],
        )
        .unwrap_err()
        .to_string();
        assert_eq!(words, "the field \"a\" was u8, and is [u8; 2] now");
    }

    /// The embedded objects' own type information: each field of a value is found.
    #[test]
    fn the_types_of_the_tables_are_read() {
        let object = aya_obj::Object::parse(super::super::object::OBJECT).unwrap();
        let bytes = object.btf.as_ref().unwrap().to_bytes();
        let btf = Btf::parse(&bytes).unwrap();
        let aya_obj::Map::Btf(ports) = &object.maps["PORTS"] else {
            panic!("a map without type information");
        };
        let described = btf.describe(ports.def.btf_value_type_id).unwrap();
        assert_eq!(
            described.size(),
            size_of::<bpf_bridge_common::layout::Port>()
        );
        assert!(described.to_string().contains("slot: u32"), "{described}");
        assert_eq!(btf.describe(ports.def.btf_key_type_id), Some(U32));
        assert!(Btf::parse(&bytes[..bytes.len() / 2]).is_none());
        assert!(Btf::parse(&[]).is_none());
    }
}

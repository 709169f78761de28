//! The JSON Schema of the configuration, for editors (`#:schema FILE` in the first line of the file).

use serde_json::{Map, Value, json};

use super::keys::{Key, Kind, Required, TOP};

/// A schema of draft 2020-12. What takes more than one value to see, only `tunroute check` finds.
#[must_use]
pub fn schema() -> Value {
    let mut schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tunroute.toml",
        "description": "The configuration of tunroute, source-based policy routing for tunnels",
    });
    if let (Some(schema), Value::Object(table)) = (schema.as_object_mut(), table(TOP)) {
        schema.extend(table);
    }
    schema
}

/// A table with these keys and no others.
fn table(keys: &[Key]) -> Value {
    let properties: Map<String, Value> = keys.iter().map(|key| (key.name.to_owned(), property(key))).collect();
    let required = |key: &&Key| key.required == Required::Yes;
    let required: Vec<&str> = keys.iter().filter(required).map(|key| key.name).collect();
    let mut table = json!({ "type": "object", "additionalProperties": false, "properties": properties });
    if !required.is_empty() {
        table["required"] = json!(required);
    }
    let alternatives = keys.iter().filter_map(|key| match key.required {
        Required::Unless(other) => Some(json!({ "anyOf": [{ "required": [key.name] }, { "required": [other] }] })),
        Required::Yes | Required::No => None,
    });
    let alternatives: Vec<Value> = alternatives.collect();
    if !alternatives.is_empty() {
        table["allOf"] = json!(alternatives);
    }
    table
}

fn property(key: &Key) -> Value {
    let mut property = value(key.kind);
    property["description"] = json!(description(key));
    if let Some(default) = key.default.and_then(|default| serde_json::from_str::<Value>(default).ok()) {
        property["default"] = default;
    }
    property
}

fn description(key: &Key) -> String {
    match key.kind {
        Kind::Choice(words) => {
            let words: Vec<String> = words.iter().map(|(word, meaning)| format!("\"{word}\": {meaning}")).collect();
            format!("{} {}.", key.doc, words.join("; "))
        }
        Kind::Text(form) | Kind::Texts(form) => format!("{} Form: {form}.", key.doc),
        _ => key.doc.to_owned(),
    }
}

fn value(kind: Kind) -> Value {
    let text = json!({ "type": "string", "minLength": 1 });
    match kind {
        Kind::Flag => json!({ "type": "boolean" }),
        Kind::Number(least, most) => json!({ "type": "integer", "minimum": least, "maximum": most }),
        Kind::WordOrNumber(word, least, most) => {
            json!({ "anyOf": [{ "const": word }, { "type": "integer", "minimum": least, "maximum": most }] })
        }
        Kind::Duration => json!({ "type": "string", "pattern": "^ *[0-9]+ *[a-zA-Z]+( *[0-9]+ *[a-zA-Z]+)* *$" }),
        Kind::Choice(words) => json!({ "enum": words.iter().map(|(word, _)| word).collect::<Vec<_>>() }),
        Kind::Text(_) => text,
        Kind::Texts(_) => json!({ "anyOf": [text, { "type": "array", "items": text }] }),
        Kind::Command => json!({ "type": "array", "minItems": 1, "items": { "type": "string" } }),
        Kind::Table(keys) => table(keys),
        Kind::OneOrMore(keys) => json!({ "anyOf": [table(keys), { "type": "array", "items": table(keys) }] }),
        Kind::Tables(keys) => json!({ "type": "array", "items": table(keys) }),
        Kind::Named(_, keys) => json!({ "type": "object", "additionalProperties": table(keys) }),
    }
}

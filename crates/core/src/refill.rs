//! How are records written again without asking for memory? Lists keep their elements, and
//! elements what they own.

/// Makes `list` say what `items` say, one element for each: `set` writes one, over what stood
/// there.
pub(crate) fn refill<T: Default, I>(
    list: &mut Vec<T>,
    items: impl ExactSizeIterator<Item = I>,
    mut set: impl FnMut(&mut T, I),
) {
    list.resize_with(items.len(), T::default);
    list.iter_mut().zip(items).for_each(|(element, item)| set(element, item));
}

/// Makes `text` say what `new` says.
pub(crate) fn rewrite(text: &mut String, new: &str) {
    text.clear();
    text.push_str(new);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_keep_what_they_own() {
        let mut list = vec![String::with_capacity(64), String::new(), String::from("gone")];
        let kept = list[0].as_ptr();
        refill(&mut list, ["one", "two"].into_iter(), rewrite);
        assert_eq!(list, ["one", "two"]);
        assert_eq!(list[0].as_ptr(), kept);
        refill(&mut list, std::iter::empty::<&str>(), rewrite);
        assert!(list.is_empty());
    }
}

"""What runs in the browser: scripts of the page's own parts, and of the controls after a look."""

# What a tag tells the server: its class, and which scores its map is of.
ON_TAG = """element.addEventListener('click', event => {
  const tag = event.target.closest('button.tag');
  if (tag) trigger('choose', {index: Number(tag.dataset.class), scores: tag.dataset.scores});
});"""
LINK = """<label for="link-text">Link to this view</label>
<div class="link"><input id="link-text" readonly disabled>
<button type="button" disabled>Copy link</button></div>
<p class="small" role="status"></p>"""
ON_LINK = """const field = element.querySelector('input'), button = element.querySelector('button');
const status = element.querySelector('[role=status]');
const update = () => {
  field.disabled = button.disabled = !props.value;
  status.textContent = '';
  if (!props.value) { field.value = ''; return; }
  history.replaceState(history.state, '', '?' + props.value);
  field.value = location.href;
  if (new URLSearchParams(props.value).get('picture') === 'uploaded')
    status.textContent = 'Your picture is not part of the link: who opens it sees these settings on an example.';
};
watch('value', update);
button.addEventListener('click', async () => {
  field.select();
  try { await navigator.clipboard.writeText(field.value); status.textContent = 'Copied.'; }
  catch { status.textContent = 'The browser does not let this page copy: the link is selected, press Ctrl+C.'; }
});
update();"""
# What changed, for those who do not see it.
SPOKEN = '<p class="spoken" role="status"></p>'
ON_SPOKEN = """const update = () => { element.querySelector('p').textContent = props.value || ''; };
watch('value', update);
update();"""
# Once a look has ended, controls that still say what was asked say what is shown. Others are those of the next look.
SETTLE = """(outcome, model, example, upload) => outcome ? [
  model === outcome.asked[0] ? outcome.shown[0] : model,
  example === outcome.asked[1] ? outcome.shown[1] : example,
  upload && upload.path === outcome.asked[2] ? null : upload,
] : [model, example, upload]"""
# Of the controls that gradio draws: a number beyond the ends of its slider becomes that end before the server learns of
# it, and the examples are one group for the arrow keys.
WHOLE_PAGE = """() => {
  document.addEventListener('input', event => {
    const field = event.target;
    if (field.type !== 'number' || field.value === '' || field.max === '') return;
    const value = Math.min(Math.max(Number(field.value), Number(field.min)), Number(field.max));
    if (value !== Number(field.value)) field.value = value;
  }, true);
  const group = () => document.querySelectorAll('#examples input').forEach(radio => { radio.name = 'examples'; });
  new MutationObserver(group).observe(document.body, {childList: true, subtree: true});
  group();
}"""
